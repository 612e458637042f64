"""Reference layers for a course on normalising flows: one idea a file, the paper cited on top.

`import flowkit` loads nothing heavy. A name such as `flowkit.Coupling`, or a module such as `flowkit.toys`, is
imported when it is first used, so the light modules (settings, toys, plotting) never pull in a layer.
"""
from importlib import import_module

_NAMES = {
    "core": ("Transform", "Compose", "Inverse", "Flow", "StandardNormal"),
    "elementwise": ("mixture_cdf", "mix_logit_cdf", "dsf", "ddsf_layer", "invert_increasing", "Shift", "Affine", "GatedAffine",
                    "MixLogitCDF", "DSF", "DDSF", "MixGaussianCDF", "Logit"),
    "planar": ("Planar", "Radial", "Sylvester"),
    "coupling": ("Coupling", "AdditiveCoupling", "MixCoupling"),
    "linear": ("Reverse", "Permute", "ActNorm", "InvertibleLinear"),
    "autoregressive": ("Autoregressive", "MAF", "IAF", "NAF", "CategoricalPixels"),
    "nets": ("MLP", "MADE", "made_masks", "CausalConv1d", "WaveNet", "pixelcnn_mask", "MaskedConv2d", "PixelCNN",
             "causal_attention", "MaskedTransformer", "GatedConv", "GatedAttention", "FlowPPNet", "ConvClassifier"),
    "continuous": ("CNF", "FFJORD", "VectorField", "ProbabilityFlow", "exact_trace", "hutchinson_trace"),
    "residual": ("Residual", "Geometric", "ShiftedPoisson", "SpectralLinear", "SpectralConv2d", "LipSwish", "lip_swish", "lipschitz_mlp",
                 "lipschitz_convnet", "spectral_normalize", "residual_inverse", "power_series_logdet", "roulette_sum",
                 "russian_roulette_logdet", "neumann_gradient"),
    "discrete": ("modular_shift", "modular_unshift", "one_hot_argmax_st", "round_st", "ModularCoupling", "RoundedShift", "IDFCoupling",
                 "DiscretisedLogistic", "FactorisedCategorical"),
    "surjective": ("Slice", "Split", "Abs", "Max", "Sort", "Argmax", "VAELayer"),
    "dequantization": ("uniform_dequantize", "variational_bound", "UniformDequantizer", "VariationalDequantizer", "FlowProposal"),
    "images": ("bits_per_dim", "frechet_distance", "Squeeze", "ChannelWise", "Conv1x1", "ActNorm2d", "ImageCoupling", "FactorOut",
               "MultiScale", "flow_plus_plus"),
    "inference": ("reverse_kl", "forward_kl", "elbo", "iwae_log_prob", "FlowPosterior", "sample_at_temperature", "hybrid_loss"),
    "training": ("fit", "kl_gap", "History"),
    "soap": ("SOAP",),
    "toys": (),
    "datasets": (),
    "live": (),
    "plotting": (),
    "widgets": (),
    "settings": (),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_HOME, *_NAMES]


def __getattr__(name):
    if name in _NAMES:
        return import_module(f"flowkit.{name}")
    if name in _HOME:
        return getattr(import_module(f"flowkit.{_HOME[name]}"), name)
    raise AttributeError(f"flowkit has no {name!r}")


def __dir__():
    return sorted(__all__)
