"""`jaxstack compress`: a trained classifier with fewer channels."""

import argparse
from collections.abc import Mapping
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, real, row_flags, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "compress",
        _compress,
        "Remove channels of a trained classifier one by one, with training in between (prune-and-tune), and store the "
        "smaller network as a run of its own.",
    )
    p.add_argument("run_dir", metavar="RUN", help="of `jaxstack train classifier`, wrn-D-W or densenet-bc-D-K")
    p.add_argument("--method", default="fisher", metavar="NAME", help="fisher, l1, l1-normalised, l1-signed or random")
    p.add_argument("--keep", type=real, default=0.5, help="share of the middle channels that stay, in (0, 1]")
    p.add_argument("--out", metavar="DIR", required=True, help="a new directory")
    p.add_argument("--updates", type=whole, default=100, help="between two removals; default: 100, as the paper")
    p.add_argument("--batch-size", type=whole, help="default: the run's")
    p.add_argument("--lr", type=real, default=8e-4, help="of these updates")
    p.add_argument("--seed", type=whole, default=0, help="of the batches")
    row_flags(p)


def _compress(args: argparse.Namespace, _: list[str]) -> None:
    import json
    from pathlib import Path

    import jax

    from jaxstack.core import rundir, runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.files import write_whole
    from jaxstack.nn import classifier
    from jaxstack.nn.supervised import variables, with_variables
    from jaxstack.vision import structured_pruning as sp

    learner, state = runs.one_row(args, acts=False)
    config = learner.config
    if learner.name != "classifier" or not hasattr(classifier.network(config), "mid_features"):
        what = config.model if learner.name == "classifier" else learner.name
        raise UserError(f"{args.run_dir}: found {what}, expected a classifier with --model wrn-D-W or densenet-bc-D-K")
    if config.pointwise:
        raise UserError(f"{args.run_dir}: found --pointwise {config.pointwise}, expected plain convolutions")
    if not 0.0 < args.keep <= 1.0:
        raise UserError(f"--keep {args.keep:g}: expected a share in (0, 1]")
    if args.updates < 1 or args.lr < 0:
        raise UserError(f"--updates {args.updates}, --lr {args.lr:g}: expected at least 1 update, a rate of 0 or more")
    criterion = sp.criterion_number(args.method)
    rundir.RunDir.check(args.out)
    network = classifier.network(config)
    mid = network.middle()
    removals = sum(mid) - max(1, round(args.keep * sum(mid)))
    x, y = classifier.arrays(config, "train")
    batch_size = config.batch_size if args.batch_size is None else args.batch_size
    rows = sp.shuffled_rows(len(x), removals, args.updates, batch_size, args.seed)
    tuning = sp.Tuning(args.lr, float(state.hypers.momentum), float(state.hypers.weight_decay))

    def change(key: jax.Array, x: jax.Array) -> jax.Array:
        return classifier.prepared(config, classifier.augmented(config, key, (x, None))[0])

    whole = variables(state)
    pruned = sp.begin(whole, mid, jax.random.key(args.seed), tuning)
    data = jax.device_put((x, y))
    step = jax.jit(lambda s, data, rows: sp.prune_and_tune(network, data, s, rows, criterion, tuning, change))
    shown = max(1, removals // 10)
    for n in range(removals):
        pruned, _index = step(pruned, data, rows[n : n + 1])
        if (n + 1) % shown == 0 or n + 1 == removals:
            print(f"{n + 1} of {removals} channels removed: {' '.join(map(str, sp.widths(pruned.masks)))} left")
    left, small = sp.compress({"params": pruned.params, **pruned.stats}, pruned.masks)
    made = classifier.classifier(config, mid_features=left, num_updates=max(1, removals * args.updates))
    new = with_variables(made, small, made.config.num_updates, state.hypers)
    one = lambda tree: jax.tree.map(lambda v: v[None], tree)
    runner.save(made, one(new), [args.seed], args.out)
    facts = {"run": args.run_dir, "method": args.method, "keep": args.keep, "updates": args.updates}
    facts["networks"] = _table({args.run_dir: (config, state), args.out: (made.config, new)}, x)
    write_whole(Path(args.out) / "compress.json", json.dumps(facts, indent=1))
    print(f"run: {args.out}")


def _table(nets: Mapping[str, tuple[Any, Any]], x: Any) -> dict[str, dict[str, float]]:
    """Print parameters, errors and latencies of networks, given by name as (config, state), and return them."""
    import jax

    from jaxstack.core import config as configs
    from jaxstack.core import runner
    from jaxstack.nn import classifier
    from jaxstack.nn.supervised import variables
    from jaxstack.report import timing

    print(f"{'network':<24} {'parameters':>11} {'valid error':>12} {'test error':>11} {'batch 1':>9} {'batch 32':>9}")
    applied = {name: classifier.model_of(config).apply for name, (config, _) in nets.items()}
    given = {name: variables(state) for name, (_, state) in nets.items()}
    forms = {name: lambda given, x, name=name: applied[name](given[name], x) for name in nets}
    times = {
        size: timing.interleaved(forms, [(given, x[i : i + size]) for i in (0, 1)], repeats=15) for size in (1, 32)
    }
    found = {}
    for name, (config, state) in nets.items():
        count = sum(v.size for v in jax.tree.leaves(state.params))
        parts = [classifier.classifier(configs.replace(config, eval_split=part)) for part in ("valid", "test")]
        states = jax.tree.map(lambda v: v[None], state)
        wrong = [1.0 - float(runner.evaluate(part, states)["eval/accuracy"][0]) for part in parts]
        own = [1e3 * times[size][name].median for size in (1, 32)]
        ms = [f"{t:.2f} ms" for t in own]
        print(f"{name:<24} {count:>11,} {wrong[0]:>12.2%} {wrong[1]:>11.2%} {ms[0]:>9} {ms[1]:>9}")
        values = (count, *wrong, *own)
        found[name] = dict(zip(("parameters", "valid_error", "test_error", "ms_batch_1", "ms_batch_32"), values))
    return found
