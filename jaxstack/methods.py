"""The registry: a row for each published method and each learner. Everything that lists them derives from it.

Rows hold names only: `module:attribute` is imported when it is asked for, so a list costs nothing. Wherever a name is
taken, `module:attribute` of a user's own is taken too.
"""

from dataclasses import dataclass

from jaxstack.core.registry import Registry


@dataclass(frozen=True)
class Method:
    """A published method, or a learner that methods are compared with (`group` "agent" or "learner")."""

    slug: str
    """Its name on the command line, and of its files in docs/."""
    group: str
    title: str
    """The paper's title, or what the learner is."""
    year: int
    """Of the paper's first version."""
    arxiv: tuple[str, ...] = ()
    """Identifiers of the papers on arXiv."""
    factory: str | None = None
    """`module:attribute` of the function that makes its learner; the module's `Config` has the options. None: it trains
    nothing by itself."""
    claim: str | None = None
    """`module:attribute` of its `Claim`."""
    data: tuple[str, ...] = ()
    """Data sets that its full claim needs, by the names that `--data NAME=DIR` takes."""
    extras: tuple[str, ...] = ()
    """Optional dependencies of the package that it needs: `pip install 'jaxstack[EXTRA]'`."""
    tests: str | None = None
    """The file of its tests."""

    @property
    def published(self) -> bool:
        """Whether this is one of the methods that the project reproduces; else one that they are compared with."""
        return self.group not in ("agent", "learner")

    @property
    def planned(self) -> bool:
        """Whether there is nothing to run yet."""
        return self.factory is None and self.claim is None

    @property
    def page(self) -> str:
        """Its page, from the root of the repository."""
        return f"docs/methods/{self.slug}.md"


METHODS: tuple[Method, ...] = (
    Method(
        "hypermarl",
        "multi-agent",
        "HyperMARL: adaptive hypernetworks for multi-agent RL",
        2024,
        arxiv=("2412.04233",),
        factory="jaxstack.agents.hypermarl:hypermarl",
        claim="jaxstack.claims.hypermarl:claim",
        tests="tests/agents/test_hypermarl.py",
    ),
    Method(
        "kalman-linear-attention",
        "sequence",
        "Kalman Linear Attention: parallel Bayesian filtering",
        2026,
        arxiv=("2602.10743",),
        claim="jaxstack.claims.kalman_linear_attention:claim",
        tests="tests/claims/test_kalman_linear_attention.py",
    ),
    Method(
        "mate",
        "multi-agent",
        "Learning task embeddings for teamwork adaptation",
        2022,
        arxiv=("2207.02249",),
        factory="jaxstack.agents.mate:mate",
        claim="jaxstack.claims.mate:claim",
        tests="tests/agents/test_mate.py",
    ),
    Method(
        "decpomdp-probes",
        "multi-agent",
        "Probing Dec-POMDP reasoning in cooperative MARL",
        2026,
        arxiv=("2602.20804",),
        claim="jaxstack.claims.decpomdp_probes:claim",
        tests="tests/measures/test_probes.py",
    ),
    Method(
        "markov-property",
        "multi-agent",
        "Remembering the Markov property in cooperative MARL",
        2025,
        arxiv=("2507.18333",),
        claim="jaxstack.claims.markov_property:claim",
        tests="tests/measures/test_conventions.py",
    ),
    Method(
        "ptgood",
        "reinforcement learning",
        "Planning to go out-of-distribution in offline-to-online RL",
        2023,
        arxiv=("2310.05723",),
        factory="jaxstack.agents.ptgood:ptgood",
        claim="jaxstack.claims.ptgood:claim",
        tests="tests/agents/test_ptgood.py",
    ),
    Method(
        "imitate-then-improve",
        "reinforcement learning",
        "Efficient offline RL: first imitate, then improve",
        2024,
        arxiv=("2406.13376",),
        factory="jaxstack.agents.imitate_then_improve:imitate_then_improve",
        claim="jaxstack.claims.imitate_then_improve:claim",
        tests="tests/agents/test_imitate_then_improve.py",
    ),
    Method(
        "rationality",
        "reinforcement learning",
        "Rationality measurement and theory for RL agents",
        2026,
        arxiv=("2602.04737",),
        claim="jaxstack.claims.rationality:claim",
        tests="tests/measures/test_rationality.py",
    ),
    Method(
        "aligning-agents",
        "reinforcement learning",
        "Aligning agents like large language models",
        2024,
        arxiv=("2406.04208",),
    ),
    Method("diamond", "world models", "Diffusion for world modeling", 2024, arxiv=("2405.12399",)),
    Method("oc-storm", "world models", "Object-centric world models improve RL", 2025, arxiv=("2501.16443",)),
    Method("world-model-1x", "world models", "Generative world modelling for humanoids", 2025, arxiv=("2510.07092",)),
    Method(
        "llm-personalize",
        "language",
        "LLM-Personalize: aligning planners with preferences",
        2024,
        arxiv=("2404.14285",),
    ),
    Method("forgetting", "learning", "Forgetting is everywhere", 2025, arxiv=("2511.04666",)),
    Method(
        "chunking",
        "learning",
        "Chunking: continual learning is not just about distribution shift",
        2023,
        arxiv=("2310.02206",),
        factory="jaxstack.learning.chunking:chunking",
        claim="jaxstack.claims.chunking:claim",
        tests="tests/learning/test_chunking.py",
    ),
    Method(
        "cl-hpo",
        "learning",
        "Hyperparameter selection in continual learning",
        2024,
        arxiv=("2404.06466",),
        claim="jaxstack.claims.cl_hpo:claim",
        tests="tests/learning/test_cl_hpo.py",
    ),
    Method(
        "deepccg",
        "learning",
        "Approximate Bayesian class-conditional models under representation shift",
        2024,
        arxiv=("2305.19076",),
        factory="jaxstack.learning.deepccg:deepccg",
        claim="jaxstack.claims.deepccg:claim",
        tests="tests/learning/test_deepccg.py",
    ),
    Method(
        "poem",
        "learning",
        "Contrastive meta-learning for partially observable few-shot learning",
        2023,
        arxiv=("2301.13136",),
    ),
    Method(
        "fsl-imbalance", "learning", "Few-shot learning with class imbalance", 2021, arxiv=("2101.02523", "2104.05344")
    ),
    Method(
        "forward-correction",
        "learning",
        "Label noise: correcting the forward-correction",
        2023,
        arxiv=("2307.13100",),
        factory="jaxstack.learning.forward_correction:forward_correction",
        claim="jaxstack.claims.forward_correction:claim",
        tests="tests/learning/test_forward_correction.py",
    ),
    Method(
        "noisy-early-stopping",
        "learning",
        "Noisy early stopping for noisy labels",
        2024,
        arxiv=("2409.06830",),
        factory="jaxstack.learning.noisy_early_stopping:noisy_early_stopping",
        claim="jaxstack.claims.noisy_early_stopping:claim",
        tests="tests/learning/test_noisy_early_stopping.py",
    ),
    Method(
        "fds",
        "optimisation",
        "Gradient-based hyperparameter optimization over long horizons",
        2021,
        arxiv=("2007.07869",),
        factory="jaxstack.optim.fds_training:fds",
        claim="jaxstack.claims.fds:claim",
        tests="tests/optim/test_fds.py",
    ),
    Method(
        "weight-constrained-sgld",
        "optimisation",
        "Better training using weight-constrained stochastic dynamics",
        2021,
        arxiv=("2106.10704",),
        factory="jaxstack.optim.constrained_langevin:weight_constrained_sgld",
        claim="jaxstack.claims.weight_constrained_sgld:claim",
        tests="tests/optim/test_constrained_langevin.py",
    ),
    Method(
        "zero-shot-kt",
        "vision",
        "Zero-shot knowledge transfer via adversarial belief matching",
        2019,
        arxiv=("1905.09768",),
        claim="jaxstack.claims.zero_shot_kt:claim",
        tests="tests/vision/test_zero_shot_kt.py",
    ),
    Method(
        "naswot",
        "vision",
        "Neural architecture search without training",
        2021,
        arxiv=("2006.04647",),
        claim="jaxstack.claims.naswot:claim",
        tests="tests/vision/test_naswot.py",
    ),
    Method(
        "blockswap",
        "vision",
        "BlockSwap: Fisher-guided block substitution",
        2020,
        arxiv=("1906.04113",),
        claim="jaxstack.claims.blockswap:claim",
        tests="tests/vision/test_blockswap.py",
    ),
    Method(
        "structured-pruning",
        "vision",
        "A closer look at structured pruning",
        2018,
        arxiv=("1810.04622",),
        claim="jaxstack.claims.structured_pruning:claim",
        tests="tests/vision/test_structured_pruning.py",
    ),
    Method(
        "separable-layers",
        "vision",
        "Separable layers enable structured efficient linear substitutions",
        2019,
        arxiv=("1906.00859",),
        claim="jaxstack.claims.separable_layers:claim",
        tests="tests/vision/test_separable_layers.py",
    ),
    Method(
        "grouped-convolutions",
        "vision",
        "Optimizing grouped convolutions on edge devices",
        2020,
        arxiv=("2006.09791",),
        claim="jaxstack.claims.grouped_convolutions:claim",
        tests="tests/vision/test_grouped_convolutions.py",
    ),
    Method(
        "dlas",
        "vision",
        "DLAS: the deep learning acceleration stack",
        2023,
        arxiv=("2311.08909",),
        claim="jaxstack.claims.dlas:claim",
        tests="tests/vision/test_dlas.py",
    ),
    Method(
        "cleave",
        "edge",
        "Harnessing idle compute at the edge for foundation model training",
        2025,
        arxiv=("2512.22142",),
        claim="jaxstack.claims.cleave:claim",
        tests="tests/edge/test_cleave.py",
    ),
    Method("dam", "series", "DAM: towards a foundation model for forecasting", 2024, arxiv=("2407.17880",)),
    Method(
        "mixft", "series", "Adapting time series foundation models through data mixtures", 2026, arxiv=("2603.02840",)
    ),
    Method(
        "signature-mmd",
        "series",
        "Signature-kernel based evaluation metrics for forecasting",
        2026,
        arxiv=("2602.10182",),
        claim="jaxstack.claims.signature_mmd:claim",
        tests="tests/measures/test_signature_mmd.py",
    ),
    Method("halo", "series", "Hamiltonian latent operators", 2022, arxiv=("2112.01641",)),
    Method(
        "vae-geometry",
        "representation",
        "Adversarial robustness of VAEs through local geometry",
        2023,
        arxiv=("2208.03923",),
    ),
    Method(
        "graph-multires", "representation", "Contrastive learning for non-local graphs", 2023, arxiv=("2308.10077",)
    ),
    Method(
        "antbo",
        "design",
        "Automated antibody design with combinatorial Bayesian optimisation",
        2023,
        arxiv=("2201.12570",),
    ),
    Method(
        "acat",
        "medical",
        "ACAT: adversarial counterfactual attention",
        2023,
        arxiv=("2303.15421",),
        factory="jaxstack.medical.acat:acat",
        claim="jaxstack.claims.acat:claim",
        extras=("medical",),
        tests="tests/medical/test_acat.py",
    ),
    Method(
        "diffusion-counterfactual",
        "medical",
        "Diffusion models for counterfactual generation in brain images",
        2023,
        arxiv=("2308.02062",),
        factory="jaxstack.medical.diffusion_counterfactual:diffusion_counterfactual",
        claim="jaxstack.claims.diffusion_counterfactual:claim",
        extras=("medical",),
        tests="tests/medical/test_diffusion_counterfactual.py",
    ),
    Method(
        "stroke-ct",
        "medical",
        "Identifying acute ischemic stroke lesions on brain CT",
        2023,
        arxiv=("2309.17320",),
        factory="jaxstack.medical.stroke_ct:stroke_ct",
        claim="jaxstack.claims.stroke_ct:claim",
        extras=("medical",),
        tests="tests/medical/test_stroke_ct.py",
    ),
    Method(
        "pgd",
        "vision",
        "Prediction-guided distillation for dense object detection",
        2022,
        arxiv=("2203.05469",),
        factory="jaxstack.vision.pgd_training:pgd",
        claim="jaxstack.claims.pgd:claim",
        tests="tests/vision/test_pgd.py",
    ),
    Method(
        "peppr",
        "medical",
        "Global explainability in aligned image modalities",
        2021,
        arxiv=("2112.09591",),
        claim="jaxstack.claims.peppr:claim",
        extras=("medical",),
        tests="tests/medical/test_peppr.py",
    ),
    Method(
        "uwf-diseases",
        "medical",
        "Detection of retinal diseases in ultra-widefield images",
        2022,
        arxiv=("2203.06113",),
        factory="jaxstack.medical.uwf:uwf_diseases",
        claim="jaxstack.claims.uwf_diseases:claim",
        extras=("medical",),
        tests="tests/medical/test_uwf.py",
    ),
    Method(
        "dart",
        "medical",
        "Deep approximation of retinal traits",
        2022,
        arxiv=("2207.05757",),
        factory="jaxstack.medical.dart:dart",
        claim="jaxstack.claims.dart:claim",
        extras=("medical",),
        tests="tests/medical/test_dart.py",
    ),
    Method(
        "quickqual",
        "medical",
        "QuickQual: retinal image quality scoring",
        2023,
        arxiv=("2307.13646",),
        claim="jaxstack.claims.quickqual:claim",
        extras=("medical",),
        tests="tests/medical/test_quickqual.py",
    ),
    Method(
        "deepgpet",
        "medical",
        "DeepGPET: analysis of the choroid in OCT",
        2023,
        arxiv=("2307.00904",),
        factory="jaxstack.medical.deepgpet:deepgpet",
        claim="jaxstack.claims.deepgpet:claim",
        extras=("medical",),
        tests="tests/medical/test_deepgpet.py",
    ),
    Method(
        "choroidalyzer",
        "medical",
        "Choroidalyzer: choroidal analysis in OCT",
        2023,
        arxiv=("2312.02956",),
        factory="jaxstack.medical.choroidalyzer:choroidalyzer",
        claim="jaxstack.claims.choroidalyzer:claim",
        extras=("medical",),
        tests="tests/medical/test_choroidalyzer.py",
    ),
    Method(
        "reachnet",
        "medical",
        "REACHNet: choroid segmentation in OCT",
        2024,
        arxiv=("2405.14453",),
        factory="jaxstack.medical.reachnet:reachnet",
        claim="jaxstack.claims.reachnet:claim",
        extras=("medical",),
        tests="tests/medical/test_reachnet.py",
    ),
    # learners that methods are compared with
    Method(
        "ppo",
        "agent",
        "Proximal policy optimisation, one agent",
        2017,
        ("1707.06347",),
        "jaxstack.agents.ppo:ppo",
        tests="tests/agents/test_contract.py",
    ),
    Method(
        "dqn",
        "agent",
        "Deep Q-learning for one agent: double, dueling, n-step, layer or weight normalisation",
        2013,
        ("1312.5602", "1509.06461", "1511.06581"),
        "jaxstack.agents.dqn:dqn",
        tests="tests/agents/test_dqn.py",
    ),
    Method(
        "sac",
        "agent",
        "Soft actor-critic for one agent with real actions",
        2018,
        ("1801.01290", "1812.05905"),
        "jaxstack.agents.sac:sac",
        tests="tests/agents/test_sac.py",
    ),
    Method(
        "td3",
        "agent",
        "TD3: addressing function approximation error in actor-critic methods",
        2018,
        ("1802.09477",),
        "jaxstack.agents.td3_online:td3",
        tests="tests/agents/test_td3.py",
    ),
    Method(
        "ippo",
        "agent",
        "PPO for each agent of a team, with shared or separate parameters",
        2020,
        ("2011.09533",),
        "jaxstack.agents.ippo:ippo",
        tests="tests/agents/test_sharing.py",
    ),
    Method(
        "mappo",
        "agent",
        "PPO with a critic of the whole team",
        2021,
        ("2103.01955",),
        "jaxstack.agents.mappo:mappo",
        tests="tests/agents/test_sharing.py",
    ),
    Method(
        "happo",
        "agent",
        "Trust regions in multi-agent RL: agents updated one after another",
        2021,
        ("2109.11251",),
        "jaxstack.agents.happo:happo",
        tests="tests/agents/test_heterogeneous.py",
    ),
    Method(
        "dico",
        "agent",
        "Controlling behavioural diversity in multi-agent RL",
        2024,
        ("2405.15054",),
        "jaxstack.agents.dico:dico",
        tests="tests/agents/test_heterogeneous.py",
    ),
    Method(
        "kaleidoscope",
        "agent",
        "Kaleidoscope: learnable masks for heterogeneous multi-agent RL",
        2024,
        ("2410.08540",),
        "jaxstack.agents.kaleidoscope:kaleidoscope",
        tests="tests/agents/test_heterogeneous.py",
    ),
    Method(
        "bc",
        "agent",
        "Behaviour cloning from a data set, of all or of its best episodes",
        2021,
        ("2106.01345",),
        "jaxstack.agents.bc:bc",
        tests="tests/agents/test_offline.py",
    ),
    Method(
        "td3_bc",
        "agent",
        "TD3+BC: a minimalist approach to offline RL",
        2021,
        ("2106.06860",),
        "jaxstack.agents.td3_bc:td3_bc",
        tests="tests/agents/test_offline.py",
    ),
    Method(
        "rebrac",
        "agent",
        "ReBRAC: revisiting the minimalist approach to offline RL",
        2023,
        ("2305.09836",),
        "jaxstack.agents.rebrac:rebrac",
        tests="tests/agents/test_offline.py",
    ),
    Method(
        "edac",
        "agent",
        "EDAC and SAC-N: offline RL with diversified critics",
        2021,
        ("2110.01548",),
        "jaxstack.agents.edac:edac",
        tests="tests/agents/test_offline.py",
    ),
    Method(
        "iql",
        "agent",
        "IQL: offline RL with implicit Q-learning",
        2021,
        ("2110.06169",),
        "jaxstack.agents.iql:iql",
        tests="tests/agents/test_iql_cql.py",
    ),
    Method(
        "cql",
        "agent",
        "CQL: conservative Q-learning for offline RL",
        2020,
        ("2006.04779",),
        "jaxstack.agents.cql:cql",
        tests="tests/agents/test_iql_cql.py",
    ),
    Method(
        "sequence",
        "learner",
        "Sequence models on a task: ten mixers, `--mixer kla` among them",
        2026,
        factory="jaxstack.sequence.trainer:sequence",
        tests="tests/sequence/test_trainer.py",
    ),
    Method(
        "classifier",
        "learner",
        "A classifier of images: MLP, LeNet, WRN, DenseNet, ResNet, VGG, MobileNet",
        2026,
        factory="jaxstack.nn.classifier:classifier",
        extras=("data",),
        tests="tests/nn/test_supervised.py",
    ),
    Method(
        "detector",
        "learner",
        "A detector of objects: FCOS or ATSS on a small network, ResNet or MobileNet",
        2026,
        factory="jaxstack.nn.detector:detector",
        tests="tests/nn/test_detector.py",
    ),
)

METHOD = {m.slug: m for m in METHODS}

LEARNERS = Registry("agent or learner", {m.slug: m.factory for m in METHODS if m.factory})
"""Name -> factory of a learner. `LEARNERS.add(name, "module:factory")` registers another for this process."""

AGENTS = Registry(
    "agent", {m.slug: m.factory for m in METHODS if m.factory and m.factory.startswith("jaxstack.agents.")}, LEARNERS
)
"""Those learners that act in an environment; what is added here is a learner too."""

CLAIMS = Registry("claim", {m.slug: m.claim for m in METHODS if m.claim})
"""Name -> its `Claim`; `jaxstack reproduce NAME` runs it."""
