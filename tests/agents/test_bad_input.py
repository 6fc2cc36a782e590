import pytest
from training import make

from jaxstack import agents
from jaxstack.core.errors import UserError


@pytest.mark.parametrize(
    ("agent", "count", "options", "message"),
    [
        ("ppo", 1, {"num_minibatches": 3}, r"num_minibatches=3: expected a divisor of num_envs\*num_steps=256"),
        ("ppo", 1, {"gru": 8, "num_minibatches": 32}, "num_minibatches=32: expected a divisor of num_envs=16"),
        ("ppo", 1, {"total_steps": 10}, "total_steps=10: expected at least one update"),
        ("ppo", 1, {"cnn": True}, "cnn=True: expected off, as observations of probe_match"),
        ("ppo", 2, {}, "env='probe': expected one agent, found 2; use ippo or mappo"),
        ("ppo", 1, {"hidden": (0,)}, r"hidden=\(0,\): expected layer widths"),
        ("ppo", 1, {"activation": "swish"}, "activation='swish': expected one of 'relu'"),
        ("ppo", 1, {"gamma": 1.5}, "gamma=1.5"),
        ("ppo", 1, {"clip": 0.0}, "clip=0.0"),
        ("ppo", 1, {"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ("ppo", 1, {"gru": -1}, "gru=-1"),
        ("ppo", 1, {"num_envs": 0}, "num_envs=0"),
        ("ppo", 1, {"pool_size": 0}, "pool_size=0"),
        ("ppo", 1, {"auto_reset": "never"}, "auto_reset='never'"),
        ("ppo", 1, {"learning_rate": 1.0}, "unknown option 'learning_rate'"),
        ("ppo", 1, {"env": "prob"}, "did you mean 'probe'"),
        ("ppo", 1, {"env_args": ("kinds=match",)}, "kinds"),
        ("ippo", 3, {"sharing": "some"}, "sharing='some': expected one of 'full'"),
        ("ippo", 3, {"groups": (0, 1, 0)}, "groups=.*expected nothing unless sharing=partial"),
        ("mappo", 3, {"sharing": "partial", "groups": (0, 1)}, "groups=.*expected one entry for each of 3 agents"),
        ("mappo", 3, {"sharing": "partial", "groups": (0, 2, 0)}, "groups=.*without gaps"),
        ("mappo", 3, {"sharing": "partial", "groups": (-1, 0, 1)}, "groups=.*without gaps"),
        ("ippo", 1, {"sharing": "partial"}, "groups need at least two agents"),
        ("ippo", 3, {"sharing": "full+id", "cnn": True}, "cnn=True"),
        ("hypermarl", 3, {"cnn": True}, "cnn=True"),
        ("hypermarl", 3, {"gru": 8, "condition": "id+obs"}, "condition='id\\+obs': expected 'id' for recurrent"),
        ("hypermarl", 3, {"hyper_hidden": ()}, "hyper_hidden=.*at least one width"),
        ("hypermarl", 3, {"hyper_hidden": (0,)}, "hyper_hidden=.*layer widths"),
        ("hypermarl", 3, {"embedding_dim": 0}, "embedding_dim=0"),
        ("hypermarl", 3, {"algorithm": "qmix"}, "algorithm='qmix'"),
        ("happo", 3, {"gru": 8}, "gru=8: expected 0: HAPPO is feed-forward"),
        ("dico", 3, {"gru": 8}, "gru=8"),
        ("dico", 3, {"diversity": -0.5}, "diversity=-0.5"),
        ("dico", 3, {"tau": 0.0}, "tau=0.0"),
        ("kaleidoscope", 3, {"gru": 8}, "gru=8"),
        ("kaleidoscope", 3, {"diversity_coef": -1.0}, "diversity_coef=-1"),
    ],
)
def test_wrong_values_are_named(agent, count, options, message):
    with pytest.raises(UserError, match=message):
        make(agent, "match", count, **options)


def test_unknown_agents_get_near_names():
    with pytest.raises(UserError, match="unknown agent 'mapo': did you mean 'mappo'"):
        agents.make("mapo")


def test_defaults_of_every_agent_are_valid_and_round_trip():
    from jaxstack.core.config import from_yaml, to_yaml

    for name in agents.AGENTS:
        cls = agents.config_class(name)
        assert from_yaml(cls, to_yaml(cls())) == cls()
