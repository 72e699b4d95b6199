"""Golden numbers of TRL's preference losses; needs numpy, torch and trl, and nothing of ours.

python tests/objectives/goldens/make_preference_goldens.py

Every number comes out of TRL's own trainers, which are made without `__init__` and given only what
their loss reads; the model is a table of log-probabilities. Values and gradients (with respect to
each target's log-probability, or to the rewards) are float64, as far as TRL lets them be.
"""

import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

FILE = Path(__file__).parent / "preference.npz"

PAIRS, TARGETS = 6, 9
BETAS = (0.05, 0.1, 0.5)
SMOOTHING, GAMMA, SFT = 0.1, 0.3, 0.7
DESIRABLE, UNDESIRABLE = 1.5, 0.75
MARGIN, CENTRING = 0.4, 0.01
# Answers in TRL's order, the chosen ones and then the rejected: targets before it, and of it
BEFORE = (1, 0, 2, 1, 3, 0, 1, 0, 2, 1, 3, 0)
LENGTHS = (3, 6, 2, 5, 1, 4, 5, 2, 7, 3, 6, 1)
# KTO's answers to other prompts
KL_LENGTHS = (2, 4, 1, 3, 5, 2, 6, 1, 3, 2, 4, 5)
DESIRED = (1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1)


def inputs() -> dict[str, np.ndarray]:
    """What the losses are functions of; multiples of 1/1024, so float32 holds them exactly."""
    rng = np.random.default_rng(0)

    def grid(low, high, shape):
        return np.round(rng.uniform(low, high, shape) * 1024) / 1024

    def mask(before, lengths):
        place, first = np.arange(TARGETS)[None], np.array(before)[:, None]
        return (place >= first) & (place < first + np.array(lengths)[:, None])

    shape = (2 * PAIRS, TARGETS)
    policy, kl_policy = grid(-2.5, -0.1, shape), grid(-2.5, -0.1, shape)
    ref = policy + grid(-0.5, 0.5, shape) + grid(-1.5, 1.5, (2 * PAIRS, 1))
    kl_ref = kl_policy - grid(-0.5, 1, shape)
    return {
        "log_probs": policy,
        "ref_log_probs": np.minimum(ref, -1 / 1024),
        "mask": mask(BEFORE, LENGTHS),
        "kl_log_probs": kl_policy,
        "kl_ref_log_probs": np.minimum(kl_ref, -1 / 1024),
        "kl_mask": mask((1,) * 2 * PAIRS, KL_LENGTHS),
        "desired": np.array(DESIRED),
        "rewards": grid(-2, 2, 2 * PAIRS),
        # The higher the better: of each pair the first is the larger by 1/2, 1, ..., 3
        "scores": np.concatenate([np.arange(1, 7) / 2 - 1.5, np.full(6, -1.5)]),
    }


# ---------------------------------------------------------------------------- trainers without init


def bare(cls, **attributes):
    """A trainer that has only these attributes, beside what all of them read."""
    import torch

    trainer = object.__new__(cls)
    same = lambda x: x  # noqa: E731
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same
    )
    trainer.model = torch.nn.Identity()
    trainer.model.is_gradient_checkpointing = False
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.aux_loss_enabled = False
    trainer.is_encoder_decoder = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


class Fused:
    """A model with TRL's fused head, which gives log-probabilities and 0 where no label is.

    The first input token says which table they are from.
    """

    training, is_gradient_checkpointing = True, False

    def __init__(self, *tables):
        self.tables = tables

    def __call__(self, input_ids, labels, **ignored):
        import torch

        table = self.tables[int(input_ids[0, 0])]
        zeros = torch.zeros_like(table)
        return SimpleNamespace(
            log_probs=table.masked_fill(labels[:, 1:] == -100, 0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros > 0,
        )


def two_logits(log_probs):
    """Logits [B, T + 1, 2] under which token 0 has these log-probabilities, with derivative 1: the
    log-sum-exp of each place is 0 whatever they are."""
    import torch

    logits = torch.stack([log_probs, torch.log1p(-torch.exp(log_probs))], dim=-1)
    return torch.nn.functional.pad(logits, (0, 0, 0, 1))


def tokens(mask, which: int = 0, name: str = ""):
    """TRL's inputs for targets under this mask: one token more, and the first counts never."""
    import torch

    counted = torch.nn.functional.pad(mask.long(), (1, 0))
    ids = torch.full_like(counted, which)
    return {
        f"{name}input_ids": ids,
        f"{name}attention_mask": torch.ones_like(ids),
        f"{name}completion_mask": counted,
    }


# ------------------------------------------------------------------------------------------- losses


def dpo(x, policy, beta: float, rows=slice(None), **attributes):
    """DPOTrainer._compute_loss; `loss_types` and `loss_weights` are attributes too."""
    from trl import DPOTrainer

    trainer = bare(
        DPOTrainer,
        **{
            "ref_model": Fused(x["ref_log_probs"][rows]),
            "beta": beta,
            "label_smoothing": 0.0,
            "loss_weights": [1.0] * len(attributes["loss_types"]),
            "ld_alpha": None,
            "precompute_ref_logps": False,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            **attributes,
        },
    )
    return trainer._compute_loss(Fused(policy[rows]), tokens(x["mask"][rows]), False)


def conservative(x, policy, beta: float):
    """TRL has no cDPO, but its "aot" of a batch of one pair, where sorting does nothing, is it."""
    kinds = {"loss_types": ["aot"], "label_smoothing": SMOOTHING}
    pairs = [[i, i + PAIRS] for i in range(PAIRS)]
    return sum(dpo(x, policy, beta, rows=pair, **kinds) for pair in pairs) / PAIRS


def without_reference(cls, x, policy, **attributes):
    """get_batch_loss_metrics of CPOTrainer and ORPOTrainer.

    ORPO's takes the cross-entropy of the prompt too, so here the prompt is hidden from it.
    """
    import torch

    trainer = bare(cls, padding_value=0, pad_token_id=0, **attributes)
    counted = torch.nn.functional.pad(x["mask"].long(), (1, 0))
    batch = {}
    for name, half in (("chosen", counted[:PAIRS]), ("rejected", counted[PAIRS:])):
        batch[f"{name}_input_ids"] = torch.zeros_like(half)
        batch[f"{name}_attention_mask"] = half
        batch[f"{name}_labels"] = torch.where(half == 1, 0, -100)
    logits = two_logits(policy)
    model = lambda *args, **kwargs: SimpleNamespace(logits=logits)  # noqa: E731
    return trainer.get_batch_loss_metrics(model, batch)[0]


def kto(x, policy, beta: float, clamped: bool):
    """KTOTrainer._compute_loss; if `clamped`, with the KL's two sides exchanged: it is negative."""
    from trl import KTOTrainer

    kl = [x["kl_log_probs"], x["kl_ref_log_probs"]]
    if clamped:
        kl.reverse()
    trainer = bare(
        KTOTrainer,
        ref_model=Fused(x["ref_log_probs"], kl[1]),
        loss_type="kto",
        beta=beta,
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        calculate_KL=True,
        precompute_ref_logps=False,
    )
    batch = tokens(x["mask"]) | tokens(x["kl_mask"], 1, "KL_") | {"label": x["desired"] == 1}
    loss = trainer._compute_loss(Fused(policy, kl[0]), batch, False)
    assert (trainer._metrics["train"]["kl"][0] == 0) == clamped
    return loss


def reward(x, rewards, margin: float, centring: float | None):
    """RewardTrainer.compute_loss; the margin is so many times the difference of scores."""
    from trl import RewardTrainer

    trainer = bare(RewardTrainer)
    trainer.args.center_rewards_coefficient = centring
    batch = {k: v for k, v in tokens(x["mask"]).items() if k != "completion_mask"}
    if margin:
        batch["margin"] = margin * (x["scores"][:PAIRS] - x["scores"][PAIRS:])
    return trainer.compute_loss(lambda **kwargs: SimpleNamespace(logits=rewards[:, None]), batch)


def losses(x) -> dict:
    """name -> a function of the policy's log-probabilities [12, T], or of the rewards [12]."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    found = {}

    def for_each_beta(name, function):
        for beta in BETAS:
            found[f"{name}-{beta}"] = lambda policy, beta=beta: function(policy, beta)

    def simpo(policy, beta, smoothing=0.0):
        attributes = {"beta": beta, "simpo_gamma": GAMMA, "label_smoothing": smoothing}
        attributes |= {"loss_type": "simpo", "alpha": 0.0, "cpo_alpha": 0.0}
        return without_reference(CPOTrainer, x, policy, **attributes)

    for kind in ("sigmoid", "hinge", "ipo", "sigmoid_norm"):
        for_each_beta(kind, lambda p, beta, kind=kind: dpo(x, p, beta, loss_types=[kind]))
    smoothed = {"label_smoothing": SMOOTHING}
    for_each_beta("robust", lambda p, beta: dpo(x, p, beta, loss_types=["robust"], **smoothed))
    for_each_beta("conservative", lambda p, beta: conservative(x, p, beta))
    rpo = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, SFT]}
    for_each_beta("rpo", lambda p, beta: dpo(x, p, beta, **rpo))
    for_each_beta("simpo", simpo)
    for_each_beta("simpo_smoothed", lambda p, beta: simpo(p, beta, SMOOTHING))
    for_each_beta("orpo", lambda p, beta: without_reference(ORPOTrainer, x, p, beta=beta))
    for_each_beta("kto", lambda p, beta: kto(x, p, beta, clamped=False))
    for_each_beta("kto_clamped", lambda p, beta: kto(x, p, beta, clamped=True))
    found["reward"] = lambda r: reward(x, r, 0.0, None)
    found["reward_margin"] = lambda r: reward(x, r, MARGIN, None)
    found["reward_centred"] = lambda r: reward(x, r, 0.0, CENTRING)
    return found


def compute() -> dict[str, np.ndarray]:
    """The file's arrays: the inputs, and `value/<name>`, `gradient/<name>` of each loss."""
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
    import torch

    arrays = inputs()
    x = {name: torch.tensor(a) for name, a in arrays.items()}
    for name, loss in losses(x).items():
        at = x["rewards" if name.startswith("reward") else "log_probs"].clone().requires_grad_()
        value = loss(at)
        value.backward()
        arrays[f"value/{name}"] = value.detach().double().numpy()
        arrays[f"gradient/{name}"] = at.grad.numpy()
    return arrays


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
    with np.load(FILE) as arrays:
        for key in arrays:
            if key.startswith("value/"):
                print(f"{key[6:]:22} {arrays[key]:.8f}")
