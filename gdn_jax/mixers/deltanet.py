"""DeltaNet (Yang et al. 2024b): the delta rule between short convolutions and a norm."""

from gdn_jax.config import GatedDeltaNetConfig, Model
from gdn_jax.mixers.gated_deltanet import GatedDeltaNet


class DeltaNet(GatedDeltaNet):
    """Token mixer S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t.

    Gated DeltaNet with alpha = 1 (g = 0), no output gate and no bias on beta: y = W_o RMSNorm(o).
    """

    @staticmethod
    def settings(cfg: Model) -> GatedDeltaNetConfig:
        mixer = cfg.deltanet
        return GatedDeltaNetConfig(
            heads=mixer.heads,
            key_dim=mixer.key_dim,
            value_dim=mixer.value_dim,
            conv_width=mixer.conv_width,
            decay=False,
            output_gate=False,
            beta_bias=False,
        )
