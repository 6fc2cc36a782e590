"""`jaxstack compress`: a trained classifier with fewer channels, or a student of it with cheaper blocks."""

import argparse
from collections.abc import Mapping
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, real, row_flags, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "compress",
        _compress,
        "Store a smaller network than a trained classifier as a run of its own: channels removed one by one with "
        "training in between (prune-and-tune), or a student whose blocks are cheaper (blockswap).",
    )
    p.add_argument("run_dir", metavar="RUN", help="of `jaxstack train classifier`, wrn-D-W or densenet-bc-D-K")
    p.add_argument(
        "--method",
        default="fisher",
        metavar="NAME",
        help="fisher, l1, l1-normalised, l1-signed or random remove channels; blockswap swaps blocks of a wrn-D-W",
    )
    p.add_argument("--out", metavar="DIR", required=True, help="a new directory")
    p.add_argument(
        "--updates",
        type=whole,
        help="between two removals, default: 100, as the paper; of a student: the run's",
    )
    p.add_argument("--batch-size", type=whole, help="default: the run's")
    p.add_argument("--lr", type=real, help="default: 8e-4 between removals, 0.1 for a student")
    p.add_argument("--seed", type=seed, default=0, help="of all draws")
    pruning = p.add_argument_group("removing channels")
    pruning.add_argument("--keep", type=real, help="share of the middle channels that stay, in (0, 1]; default: 0.5")
    swap = p.add_argument_group("blockswap")
    swap.add_argument("--budget", type=real, help="share of the run's parameters, or, from 2 on, their number")
    swap.add_argument("--candidates", type=whole, default=1000, help="networks near the budget that are scored")
    swap.add_argument("--minibatches", type=whole, default=1, help="of the scores")
    swap.add_argument("--beta", type=real, help="weight of the attention; default: 1000 for 32x32 pixels")
    row_flags(p)


def _compress(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core import rundir
    from jaxstack.core.errors import UserError
    from jaxstack.vision.structured_pruning import CRITERIA

    known = (*CRITERIA, "blockswap")
    if args.method not in known:
        raise UserError(f"--method {args.method}: expected one of {', '.join(known)}")
    swaps = args.method == "blockswap"
    for option, value, instead in (("--budget", args.budget, "--keep"), ("--keep", args.keep, "--budget")):
        if value is not None and swaps == (option == "--keep"):
            raise UserError(f"{option} {value:g}: found with --method {args.method}, expected {instead}")
    rundir.RunDir.check(args.out)
    (_swap if swaps else _prune)(args)


def _store(args: argparse.Namespace, teacher: tuple[Any, Any], learner: Any, state: Any, facts: dict[str, Any]) -> None:
    """Write the smaller network's run and compress.json, and print both networks."""
    import json
    from pathlib import Path

    import jax

    from jaxstack.core import runner
    from jaxstack.core.files import write_whole
    from jaxstack.nn import classifier

    x, _ = classifier.arrays(teacher[0], "train")
    runner.save(learner, jax.tree.map(lambda v: v[None], state), [args.seed], args.out)
    facts = {"run": args.run_dir, "method": args.method, **facts}
    facts["networks"] = _table({args.run_dir: teacher, args.out: (learner.config, state)}, x)
    write_whole(Path(args.out) / "compress.json", json.dumps(facts, indent=1))
    print(f"run: {args.out}")


def _swap(args: argparse.Namespace) -> None:
    import jax

    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.learner import rows_of
    from jaxstack.nn import attention_transfer as transfer
    from jaxstack.nn import classifier
    from jaxstack.nn.supervised import variables, with_variables
    from jaxstack.nn.vision.wrn import WRN
    from jaxstack.vision import blockswap as bs

    if args.budget is None:
        raise UserError("--budget: expected a share of the run's parameters, or their number, with --method blockswap")
    updates, beta, lr = args.updates, args.beta, 0.1 if args.lr is None else args.lr
    for option, value in (("candidates", args.candidates), ("minibatches", args.minibatches), ("updates", updates)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1")
    if lr < 0 or (beta is not None and beta < 0):
        raise UserError(f"--lr {lr:g}, --beta {0 if beta is None else beta:g}: expected numbers of 0 or more")
    learner, state = runs.one_row(args, acts=False)
    config = learner.config
    network = classifier.network(config) if learner.name == "classifier" else None
    if not isinstance(network, WRN):
        what = config.model if network is not None else learner.name
        raise UserError(f"{args.run_dir}: found {what}, expected a classifier with --model wrn-D-W")
    whole = sum(v.size for v in jax.tree.leaves(state.params))
    image = classifier.image_shape(config)
    space = bs.Space(network.depth, network.width, network.classes, image[2])
    budget = args.budget if args.budget >= 2 else args.budget * whole
    low, high = bs.budget_range(space)
    if not low <= budget <= high:
        shares = f"{low / whole:.4g} to {high / whole:.4g}, or " if args.budget < 2 else ""
        raise UserError(
            f"--budget {args.budget:g}: expected {shares}{low} to {high} parameters, those of the smallest and the "
            "largest candidate"
        )
    x, y = classifier.arrays(config, "train")
    size = config.batch_size if args.batch_size is None else args.batch_size
    if not 1 <= size <= len(x):
        raise UserError(f"--batch-size {size}: expected 1 to {len(x)}, the number of images")
    beta = transfer.attention_weight(image, 1000.0) if beta is None else beta

    k_search, k_rows, k_move = jax.random.split(jax.random.key(args.seed), 3)
    batches = []
    for i in range(args.minibatches):
        at = jax.random.choice(jax.random.fold_in(k_rows, i), len(x), (size,), replace=False)
        moved, labels = classifier.augmented(config, jax.random.fold_in(k_move, i), (jax.numpy.asarray(x)[at], y[at]))
        batches.append((classifier.prepared(config, moved), jax.numpy.asarray(labels)))
    shown = max(1, args.candidates // 10)

    def tell(done: int) -> None:
        if done % shown == 0 or done == args.candidates:
            print(f"{done} of {args.candidates} candidates scored")

    found = bs.search(k_search, batches, budget, space, args.candidates, tell=tell)
    kinds, best = found.names(0), found.order[0]
    print(
        f"blocks: {' '.join(kinds)}; {found.parameters[best]:,} parameters, Fisher potential {found.scores[best]:.4g}"
    )
    own = bs.student_config(config, kinds, config.num_updates if updates is None else updates, size, lr)
    pupil = bs.student(
        own, config, jax.tree.map(lambda v: v[None], variables(state)), transfer.Hypers(lr=lr, beta=beta)
    )
    trained = runner.train(pupil, seeds=[args.seed], eval_every=-1).state
    made = classifier.classifier(own)
    one = rows_of({"params": trained.params, **trained.stats}, 0)
    facts = {
        "budget": args.budget,
        "candidates": args.candidates,
        "minibatches": args.minibatches,
        "updates": own.num_updates,
        "beta": beta,
        "kinds": list(kinds),
        "scores": [float(v) for v in found.scores],
    }
    _store(args, (config, state), made, with_variables(made, one, own.num_updates), facts)


def _prune(args: argparse.Namespace) -> None:
    import jax

    from jaxstack.core.errors import UserError
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
    if config.kinds:
        raise UserError(f"{args.run_dir}: found block types {' '.join(config.kinds)}, expected a network without")
    keep, updates = 0.5 if args.keep is None else args.keep, 100 if args.updates is None else args.updates
    lr = 8e-4 if args.lr is None else args.lr
    if not 0.0 < keep <= 1.0:
        raise UserError(f"--keep {keep:g}: expected a share in (0, 1]")
    if updates < 1 or lr < 0:
        raise UserError(f"--updates {updates}, --lr {lr:g}: expected at least 1 update, a rate of 0 or more")
    criterion = sp.criterion_number(args.method)
    network = classifier.network(config)
    mid = network.middle()
    removals = sum(mid) - max(1, round(keep * sum(mid)))
    x, y = classifier.arrays(config, "train")
    batch_size = config.batch_size if args.batch_size is None else args.batch_size
    rows = sp.shuffled_rows(len(x), removals, updates, batch_size, args.seed)
    tuning = sp.Tuning(lr, float(state.hypers.momentum), float(state.hypers.weight_decay))

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
    made = classifier.classifier(
        config, mid_features=left, num_updates=max(1, removals * updates), **classifier.UNTAUGHT
    )
    new = with_variables(made, small, made.config.num_updates, state.hypers)
    _store(args, (config, state), made, new, {"keep": keep, "updates": updates})


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
