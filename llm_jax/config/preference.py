"""Learning from preferences: reward models and direct optimisation.

No `Literal` and no postponed annotations in this file: ml_collections reads the types at run time.
"""

from llm_jax.config.base import Config, settings


@settings
class RewardConfig(Config):
    """A reward model (llm_jax/align/reward)."""

    # logistic (Bradley-Terry) | hinge (margin ranking) | listwise (Plackett-Luce) | regression (of
    # the labels themselves)
    loss: str = "logistic"
    margin: float = 0.0  # logistic: times (label - label) is how far rewards have to be apart
    label_smoothing: float = 0.0  # share of the labels that is taken to be wrong
    centring: float = 0.0  # times the squared sum of a pair's rewards, which keeps them around 0
    # A number is trained beside the head that says what length is worth, and left out of the reward
    control_length: bool = False
    # tuned | features: the backbone stays as it is, and its features are computed once
    backbone: str = "tuned"
    # features: half this times the squared weights (of features of variance 1) is added to the loss;
    # 0: chosen by cross-validation
    l2: float = 0.0
    # features: so many disjoint parts of data.eval_fraction of the prompts are held out in turn, and
    # the accuracy over them is tested against that of preferring by length alone; 0: one, as ever
    splits: int = 0


@settings
class DirectConfig(Config):
    """Direct preference optimisation (llm_jax/align/direct)."""

    loss: str = "dpo"  # dpo | robust | ipo | hinge | kto | orpo | simpo
    beta: float = 0.1  # ipo: tau; orpo: lambda; simpo: its own, 2 is usual
    label_smoothing: float = 0.0  # share of the labels that is taken to be wrong (dpo: cDPO)
    per_token: bool = False  # mean log-ratios: length-normalised DPO, IPO as TRL has it
    length_penalty: float = 0.0  # what a token costs in the reward that is maximised (R-DPO)
    sft: float = 0.0  # times the preferred answers' cross-entropy
    gamma: float = 0.5  # simpo: the logit that the preferred answer has to be ahead by
    desirable: float = 1.0  # kto: weight of answers that are
    undesirable: float = 1.0  # kto: of those that are not
    # Where the reference's log-probabilities come from: cached (computed once, then it is gone) |
    # adapter (the model itself without its adapter, in every step) | model (a second model in every
    # step); auto: adapter with PEFT, else cached. orpo and simpo have none.
    reference: str = "auto"
    reference_path: str = ""  # another model than the one that the run starts from (cached, model)
    sample_prompts: int = 32  # held-out prompts that are answered before and after; 0: none
    sample_tokens: int = 64  # of each answer at most
