"""`jaxstack distil`: a smaller classifier from a trained one's weights alone."""

import argparse
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, row_flags, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("distil", _distil, "Teach a student by a classifier's weights alone, without data (zero-shot-kt).")
    p.add_argument("run_dir", metavar="RUN", help="a classifier's run; its network is lenet or wrn-D-W")
    p.add_argument("--out", required=True, metavar="DIR", help="the student, as a classifier's run, and distil.json")
    p.add_argument("--model", help="the student's network, such as wrn-10-0.5; default: the teacher's")
    p.add_argument("--rounds", type=whole, default=2000, help="pseudo batches; the paper has 80,000 for CIFAR-10")
    p.add_argument("--batch-size", type=whole, default=128, help="images per round")
    p.add_argument("--student-steps", type=whole, default=10, help="per round")
    p.add_argument("--generator-width", type=whole, default=128, help="channels of the generator's first layers")
    p.add_argument("--lr", type=float, default=2e-3, help="the student's")
    p.add_argument("--generator-lr", type=float, default=1e-3)
    p.add_argument("--beta", type=float, help="weight of the attention; default: 250 for 32x32 pixels, in proportion")
    p.add_argument("--few", type=whole, default=0, metavar="M", help="then tune on M training images per class")
    p.add_argument("--few-updates", type=whole, default=500, help="of that tuning")
    p.add_argument("--seed", type=seed, default=0, help="of student, generator and noise")
    row_flags(p)


def _distil(args: argparse.Namespace, _: list[str]) -> None:
    import json
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxstack.core import config as configs
    from jaxstack.core import program, runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.files import write_whole
    from jaxstack.core.rundir import RunDir
    from jaxstack.data.sources import SplitData
    from jaxstack.nn import classifier as classifiers
    from jaxstack.nn import supervised
    from jaxstack.nn.attention_transfer import attention_weight
    from jaxstack.vision import few_shot_kt
    from jaxstack.vision import zero_shot_kt as kt

    RunDir.check(args.out)
    if not (args.lr > 0 and args.generator_lr > 0):
        raise UserError(f"--lr {args.lr}, --generator-lr {args.generator_lr}: expected numbers > 0")
    for name in ("rounds", "batch_size", "student_steps"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.few < 0 or args.few_updates < 1 or args.generator_width < 2:
        raise UserError("--few, --few-updates, --generator-width: expected at least 0, 1 and 2")
    learner, state = runs.one_row(args, acts=False)
    if learner.name != "classifier":
        raise UserError(f"{args.run_dir}: found a run of {learner.name}, expected one of classifier")
    config = learner.config
    other = dict(model=args.model, **classifiers.PLAIN) if args.model else {}
    small = configs.replace(config, ema=False, **classifiers.UNTAUGHT, **other)
    for where, each in ((args.run_dir, config), ("--model", small)):
        if each.model in ("mlp", "cnn"):
            raise UserError(f"{where}: found the network {each.model}, expected one with stages: lenet or wrn-D-W")
    image = classifiers.image_shape(config)
    teacher, student = (kt.of_module(classifiers.network(c), image) for c in (config, small))
    teachers = jax.tree.map(lambda x: x[None], supervised.variables(state))
    test, why = _test_images(config)
    source = None if test is None else lambda _: SplitData(test, 512)

    wide = args.generator_width
    generator = kt.ZeroShotGenerator(image, (wide, wide, wide // 2))
    setup = kt.Setup(teacher, student, image, generator, args.batch_size, student_steps=args.student_steps)
    beta = attention_weight(image) if args.beta is None else args.beta
    hypers = kt.Hypers(lr=args.lr, generator_lr=args.generator_lr, beta=beta)
    try:
        zero = kt.zero_shot(setup, teachers, args.rounds, hypers, source)
    except UserError as e:  # stages that differ
        raise UserError(f"--model {small.model}: {e}") from None
    result = runner.train(zero, seeds=[args.seed], eval_every=-1)
    found = kt.student_variables(result.state)
    measured = {} if source is None else {k: float(v[0]) for k, v in runner.evaluate(zero, result.state).items()}
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    rows: list[dict[str, Any]] = [
        {"network": "teacher", "model": config.model, "parameters": count(state.params)},
        {"network": "student, zero-shot", "model": small.model, "parameters": count(found["params"])},
    ]
    rows[0]["accuracy"] = measured.get("eval/teacher_accuracy")
    rows[1] |= {"accuracy": measured.get("eval/accuracy"), "agreement": measured.get("eval/agreement")}
    if args.few:
        tuning = few_shot_kt.few_shot(
            teacher,
            student,
            image,
            teachers,
            num_updates=args.few_updates,
            batch_size=min(args.batch_size, args.few * classifiers.network(config).classes),
            hypers=few_shot_kt.FewShotHypers(lr=0.01, beta=attention_weight(image, 1000.0)),
            start=found,
            source=lambda _: few_shot_kt.few_source(config, args.few, (args.seed,), args.batch_size),
            eval_source=source,
        )
        tuned = runner.train(tuning, seeds=[args.seed], eval_every=-1)
        found = {"params": tuned.state.params, **tuned.state.stats}
        rows.append(
            {"network": f"student, {args.few} images per class", **{k: rows[1][k] for k in ("model", "parameters")}}
        )
        rows[2]["accuracy"] = (
            None if source is None else float(runner.evaluate(tuning, tuned.state)["eval/accuracy"][0])
        )
    target = classifiers.classifier(small)
    states, _alive = program.initial(target, [args.seed], None)
    stats = {k: v for k, v in found.items() if k != "params"}
    done = jnp.full((1,), small.num_updates, jnp.int32)
    states = states._replace(params=found["params"], stats=stats, step=done)
    last = rows[-1]["accuracy"]
    runner.save(target, states, [args.seed], args.out, {} if last is None else {"test/accuracy": np.array([last])})
    facts = {"teacher": args.run_dir, "rounds": args.rounds, "few": args.few, "beta": beta, "networks": rows}
    write_whole(Path(args.out) / "distil.json", json.dumps(facts, indent=1))
    print(f"{'network':<32} {'model':<12} {'parameters':>11} {'accuracy':>9} {'agreement':>10}")
    show = lambda x: "-" if x is None else f"{100 * x:.1f}%"
    for row in rows:
        numbers = f"{row['parameters']:>11,} {show(row['accuracy']):>9} {show(row.get('agreement')):>10}"
        print(f"{row['network']:<32} {row['model']:<12} {numbers}")
    if why:
        print(f"accuracies were not measured: {why}")
    print(f"{args.out}: a classifier's run; `jaxstack evaluate {args.out}` reads it")


def _test_images(config: Any) -> tuple[Any, str]:
    """(test images as the networks take them, labels), or None and why: the data may be gone."""
    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.nn import classifier as classifiers

    try:
        x, y = classifiers.arrays(config, "test")
    except UserError as e:
        return None, str(e)
    return (np.asarray(classifiers.prepared(config, x)), y), ""
