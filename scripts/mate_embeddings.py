"""Figure of the embeddings that MATE learns on hidden_corner, by task: principal components, and t-SNE.

    python scripts/mate_embeddings.py --steps 300000 --out docs/figures/mate-embeddings.png

Settings are those of the claim (jaxstack/claims/mate.py) without its tuning. Embeddings are those of step 10 in new
episodes with sampled actions; printed is the accuracy of the linear probe for the task on held-out episodes.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.agents import mate
from jaxstack.claims.mate import EMBEDDED, QUIET, SMALL, STEP, learner_of
from jaxstack.core.runner import train
from jaxstack.measures.task_embeddings import figure, probe_task_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=EMBEDDED, default="Ind-MATE")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/mate-embeddings.png"))
    args = parser.parse_args()
    learner = learner_of(args.arm, "hidden_corner", "train", args.steps, **SMALL)
    result = train(learner, seeds=[args.seed], options=QUIET)
    seen = mate.record(learner, result.state, jax.random.key(1), episodes=args.episodes)
    embedding, task = np.asarray(seen.embedding)[0, :, STEP], np.asarray(seen.task)[0]
    agents = range(embedding.shape[1])
    right = [float(probe_task_id(jnp.asarray(embedding[:, i]), jnp.asarray(task))) for i in agents]
    print(
        f"{args.arm}, seed {args.seed}, {args.steps} steps: the probe finds the task in", *(f"{r:.3f}" for r in right)
    )
    panels = {f"agent {i}": embedding[:, i] for i in agents}
    title = f"{args.arm} on hidden_corner after {args.steps:,} steps: embeddings of step {STEP}"
    print(figure(panels, task, args.out, tuple(learner.env.catalogue()), title))


if __name__ == "__main__":
    main()
