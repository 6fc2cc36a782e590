"""Learner contract, runner, checkpoints, statistics: what every method shares."""
