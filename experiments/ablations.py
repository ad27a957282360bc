"""Tables S.1 and S.2: what each part of Gated DeltaNet and the order of H2 are worth, 15B tokens of FineWeb-Edu.

    gdn table s1 --scale tiny                all rows, from the runs there are; s2 likewise
    python -m experiments.ablations s1 --scale tiny --task_data DIR     runs what is missing first
    gdn run ablations/no-short-conv/tiny     2-block model on ten English novels, a minute on a CPU
    gdn run ablations/no-short-conv/desk     38M parameters on Python's standard library, minutes on one GPU
    gdn run ablations/no-short-conv/400m     15B tokens: 33 GPU-hours at 400 TFLOP/s, like every ID at 400m
    gdn eval ablations/no-short-conv/tiny --tasks table3 --task_data DIR     the columns

S.1 takes one part away from, or exchanges one part of, table3/gated-deltanet/<scale> (its first row); S.2 orders the
three mixers of table3/gated-deltanet-h2/<scale> (its last row) in the three other ways it lists. Expect, in the paper,
the largest losses from dropping the decay (naive-delta-rule), L1 normalisation and short convolutions, almost none from
the output norm or another feature map under L2; a key head dim of 256 helps a little, 64 hurts.

S.1 prints two averages. "Avg-PPL" is read here as the mean of the Wiki and the LAMBADA perplexity, which it does not
say; "Avg-Acc" as the mean of Table 3's eight accuracies.
"""

from dataclasses import replace

from experiments.models import PAPER_MODELS
from experiments.table3 import RECIPES
from gdn_jax.config import Experiment, GatedDeltaNetConfig, Model

SCALES = ("tiny", "desk", "400m")
# heads and key dim; 256 does not divide 400m's key width 1152 nor desk's 384, so the wider heads' width is the nearest
HALF = {"tiny": (6, 16), "desk": (6, 64), "400m": (18, 64)}
DOUBLE = {"tiny": (2, 64), "desk": (2, 256), "400m": (4, 256)}
ORDERS = {
    "gdn-swa-mamba2": ("gated_deltanet", "swa", "mamba2"),
    "gdn-mamba2-swa": ("gated_deltanet", "mamba2", "swa"),
    "mamba2-swa-gdn": ("mamba2", "swa", "gated_deltanet"),
}


def parts(scale: str) -> dict[str, Model]:
    """Table S.1: Gated DeltaNet at a scale with one part changed."""
    base = PAPER_MODELS["gated-deltanet"][scale]
    part = base.gated_deltanet

    def heads(sizes: tuple[int, int]) -> GatedDeltaNetConfig:
        count, key_dim = sizes
        return replace(part, heads=count, key_dim=key_dim, value_dim=2 * key_dim)

    half, double = ("64", "256") if scale == "400m" else ("half", "double")
    mixers = {
        "naive-delta-rule": replace(part, decay=False),
        "no-short-conv": replace(part, conv_width=0),
        "no-output-gate": replace(part, output_gate=False),
        "no-output-norm": replace(part, output_norm=False),
        "l1-relu": replace(part, qk_norm="l1", feature_map="relu"),
        "l1-elu1": replace(part, qk_norm="l1", feature_map="elu1"),
        "l1-silu": replace(part, qk_norm="l1"),
        "l2-relu": replace(part, feature_map="relu"),
        "l2-elu1": replace(part, feature_map="elu1"),
        f"head-dim-{half}": heads(HALF[scale]),
        f"head-dim-{double}": heads(DOUBLE[scale]),
    }
    return {name: replace(base, gated_deltanet=mixer) for name, mixer in mixers.items()}


def orders(scale: str) -> dict[str, Model]:
    """Table S.2: H2 at a scale with its three mixers in another order."""
    base = PAPER_MODELS["gated-deltanet-h2"][scale]
    return {name: replace(base, pattern=order) for name, order in ORDERS.items()}


def _experiment(name: str, scale: str, model: Model) -> Experiment:
    optim, data, run = RECIPES[scale]
    return Experiment(id=f"ablations/{name}/{scale}", model=model, optim=optim, data=data, run=run)


EXPERIMENTS = tuple(
    _experiment(name, scale, model) for scale in SCALES for name, model in (parts(scale) | orders(scale)).items()
)


def rows(name: str, scale: str) -> dict[str, str]:
    """Label of each row of table s1 or s2 -> the ID that trains it."""
    if name == "s1":
        first = {"gated-deltanet": f"table3/gated-deltanet/{scale}"}
        return first | {part: f"ablations/{part}/{scale}" for part in parts(scale)}
    return {order: f"ablations/{order}/{scale}" for order in ORDERS} | {
        "mamba2-gdn-swa": f"table3/gated-deltanet-h2/{scale}"
    }


if __name__ == "__main__":
    import sys

    from experiments.commands.table import main

    main(*(sys.argv[1:2] or [""]), sys.argv[2:])
