"""The child process of bench_vision.py: the same work in PyTorch, run by a Python that has torch, torchvision and timm.

    python bench_vision_torch.py FOLDER THREADS [CLONE]     FOLDER has the arrays; CLONE of the public code of NASWOT

Commands come one a line on stdin, answers go one a line to stdout: {"do": "about"}; {"do": "make", "kind": ..., "key":
..., ...} -> numbers to compare with ours; {"do": "run", "key": ..., "calls": N} -> seconds per call; {"do": "drop"}
forgets what was made. Ends with its input.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import torch_networks as nets
from torch_detector import Detector

Call = Callable[[], Any]
FORMATS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}


def arrays(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(np.array(v)) for k, v in file.items()}


def network(folder: Path, ask: dict[str, Any], name: str, file: str) -> Any:
    with np.load(folder / f"{file}.npz", allow_pickle=False) as weights:
        module = nets.load(name, dict(weights), ask["classes"])
    return module.to(memory_format=FORMATS[ask["layout"]])


def batch(folder: Path, ask: dict[str, Any]) -> tuple[Any, Any]:
    """Images in the layout that is asked for, and labels."""
    found = arrays(folder, "batch")
    x = found["x"].permute(0, 3, 1, 2)
    return x.contiguous(memory_format=FORMATS[ask["layout"]]), found["y"].long()


def forward(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    module, (x, _) = network(folder, ask, ask["network"], "weights").eval(), batch(folder, ask)

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call, call()[0].tolist()


def train(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """SGD with momentum and decay of all weights; the number is the loss of the first step."""
    module, (x, y) = network(folder, ask, ask["network"], "weights").train(), batch(folder, ask)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def call() -> Any:
        optimiser.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return call, float(call())


def detector(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """A training step of the FCOS detector: targets, loss, gradient, clipping, SGD whose decay is of kernels alone."""
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        weights = {k: np.array(v) for k, v in file.items()}
    module = Detector(weights, *(ask[name] for name in ("size", "strides", "scale", "radius")))
    module = module.to(memory_format=FORMATS[ask["layout"]])
    data, sides = arrays(folder, "batch"), ([], [])
    images = data["x"].permute(0, 3, 1, 2).contiguous(memory_format=FORMATS[ask["layout"]])
    truth = data["boxes"], data["labels"].long(), data["valid"].bool()
    for weight in module.parameters():
        sides[weight.ndim > 1].append(weight)
    groups = [dict(params=sides[0], weight_decay=0.0), dict(params=sides[1], weight_decay=1e-4)]
    optimiser = torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    def call() -> Any:
        optimiser.zero_grad(set_to_none=True)
        loss = module.loss(images, *truth)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 35.0)
        optimiser.step()
        return loss.detach()

    return call, float(call())


def fisher(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """Fisher potential of a WRN: "public", by a backward pass to all weights as public code has it, or "branches"."""
    module, (x, y) = network(folder, ask, ask["network"], "weights").train(), batch(folder, ask)
    public = ask["form"] == "public"

    def call() -> Any:
        module.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(x), y)
        branches = [block.branch for block in module.blocks()]
        if public:
            for branch in branches:
                branch.retain_grad()
            loss.backward()
            grads = [branch.grad for branch in branches]
        else:
            grads = torch.autograd.grad(loss, branches)
        each = [(a * g).sum((2, 3)).square().mean(0).mul(0.5).sum() for a, g in zip(branches, grads)]
        return torch.stack([e.detach() for e in each]).sum()

    return call, float(call())


def naswot(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """A score of a cell in the clone's network, with the hooks and passes of its script: a forward and a backward pass,
    then a forward pass that counts."""
    from models import get_cell_based_tiny_net  # pyright: ignore[reportMissingImports]

    x = arrays(folder, "batch")["x"].permute(0, 3, 1, 2).contiguous()
    shape = {"name": "infer.tiny", "C": ask["channels"], "N": ask["cells"], "arch_str": ask["cell"], "num_classes": 1}

    def call() -> Any:
        module, count = get_cell_based_tiny_net(shape), len(x)
        total = np.zeros((count, count))

        def passed(own: Any, given: Any, out: Any) -> None:
            own.passed = True

        def counted(own: Any, given: Any, out: Any) -> None:
            nonlocal total
            if getattr(own, "passed", False):
                code = (given[0].reshape(count, -1) > 0).float()
                total = total + (code @ code.T).numpy() + ((1 - code) @ (1 - code.T)).numpy()

        for own in module.modules():
            if "ReLU" in type(own).__name__:
                own.register_forward_hook(counted)
                own.register_backward_hook(passed)
        images = x.clone().requires_grad_(True)
        logits, _ = module(images)
        logits.backward(torch.ones_like(logits))
        with torch.no_grad():
            module(x.clone())
        return np.linalg.slogdet(total)[1]

    return call, float(call())


def attention(taps: list[Any]) -> list[Any]:
    return [F.normalize(tap.square().mean(1).flatten(1)) for tap in taps]


def zero_shot(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """A round of zero-shot knowledge transfer: one step of the generator, then `steps` of the student."""
    teacher = network(folder, ask, ask["teacher"], "teacher").eval().requires_grad_(False)
    student = network(folder, ask, ask["student"], "student").train()
    generator = nets.Generator().to(memory_format=FORMATS[ask["layout"]]).train()
    adams = [torch.optim.Adam(m.parameters(), lr) for m, lr in ((student, 2e-3), (generator, 1e-3))]
    for_student, for_generator = adams

    def divergence(logits_t: Any, logits_s: Any) -> Any:
        p, q = F.log_softmax(logits_t, 1), F.log_softmax(logits_s, 1)
        return F.kl_div(q, p, reduction="none", log_target=True).mean()

    def descend(loss: Any, module: Any, optimiser: Any) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimiser.step()

    def call() -> Any:
        z = torch.randn(ask["batch"], 100)
        student.requires_grad_(False)
        x = generator(z)
        descend(-divergence(teacher(x), student(x)), generator, for_generator)
        student.requires_grad_(True)
        with torch.no_grad():
            x = generator(z)
            logits_t = teacher(x)
            maps = attention(teacher.taps)
        loss = torch.zeros(())
        for _ in range(ask["steps"]):
            logits_s = student(x)
            far = sum((a - b).square().mean() for a, b in zip(maps, attention(student.taps)))
            loss = divergence(logits_t, logits_s) + 250.0 * far
            descend(loss, student, for_student)
        return loss.detach()

    return call, float(call())


def structured(folder: Path, ask: dict[str, Any]) -> tuple[Call, Any]:
    """A separable convolution with a structured map, forward or the gradient by its arrays and input."""
    found = arrays(folder, "batch")
    p = {k[2:]: v for k, v in found.items() if k.startswith("p/")}
    if ask["map"] == "acdc":
        p["forward"], p["inverse"] = nets.cosines(p["a"].shape[1])
    x, g = (found[k].permute(0, 3, 1, 2).contiguous(memory_format=FORMATS[ask["layout"]]) for k in ("x", "g"))
    learnt = [v for k, v in p.items() if k not in ("index", "forward", "inverse")]
    p["index"] = p["index"].long() if "index" in p else None

    def call() -> Any:
        if ask["pass"] == "forward":
            with torch.inference_mode():
                return nets.separable(ask["map"], p, x, g.shape[1])
        for v in (*learnt, x):
            v.grad = None
        nets.separable(ask["map"], p, x, g.shape[1]).backward(g)
        return x.grad

    if ask["pass"] == "gradient":
        for v in (*learnt, x):
            v.requires_grad_(True)
    return call, call()[0, :, 0, 0].tolist()


KINDS = {f.__name__: f for f in (forward, train, detector, fisher, naswot, zero_shot, structured)}


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        sys.path.insert(0, sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "about":
            answer: Any = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        elif ask["do"] == "make":
            calls[ask["key"]], answer = KINDS[ask["kind"]](folder, ask)
        elif ask["do"] == "drop":
            calls, answer = {}, None
        else:
            call, begin = calls[ask["key"]], time.perf_counter()
            for _ in range(ask["calls"]):
                call()
            answer = (time.perf_counter() - begin) / ask["calls"]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
