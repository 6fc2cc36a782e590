"""Turn a file of PyTorch's into safetensors, for `jaxstack.nn.torch_weights`; run it where torch is installed.

    python scripts/torch_to_safetensors.py weights.pth weights.safetensors
    python scripts/torch_to_safetensors.py model.pth weights.safetensors --unsafe    a pickled module
    python scripts/torch_to_safetensors.py model_jit.pth weights.safetensors --script    a TorchScript program

Loading a pickled module or a TorchScript program runs code of the file's author: only for files that you trust. This is
the only file of the project that loads one, and the only one that needs torch for more than writing.
"""

import argparse
import importlib
import pickle


def main() -> None:
    """Read, find the state dict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("target", help="ending in .safetensors")
    parser.add_argument("--unsafe", action="store_true", help="unpickle whole objects: runs code of the file")
    parser.add_argument("--script", action="store_true", help="a TorchScript program: runs code of the file")
    args = parser.parse_args()
    if not args.target.endswith(".safetensors"):
        parser.error(f"{args.target}: expected a name ending in .safetensors")
    torch = importlib.import_module("torch")
    save_file = importlib.import_module("safetensors.torch").save_file
    if args.script:
        found = torch.jit.load(args.source, map_location="cpu")
    else:
        try:
            found = torch.load(args.source, map_location="cpu", weights_only=not args.unsafe)
        except pickle.UnpicklingError:
            parser.error(f"{args.source}: holds more than tensors; --unsafe runs its code, --script takes TorchScript")
    state = found.state_dict() if hasattr(found, "state_dict") else found
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        parser.error(f"{args.source}: found no state dict")
    # copies: tensors that share memory cannot be stored
    save_file({name: x.detach().clone().contiguous() for name, x in state.items()}, args.target)
    print(f"{len(state)} tensors: {args.target}")


if __name__ == "__main__":
    main()
