"""Reference layers for a course on normalising flows: one idea a file, the paper cited on top.

`import flowkit` loads nothing heavy. A name such as `flowkit.Coupling`, or a module such as `flowkit.toys`, is
imported when it is first used, so the light modules (settings, toys, plotting) never pull in a layer.
"""
from importlib import import_module

_NAMES = {
    "core": ("Transform", "Compose", "Inverse", "Flow", "StandardNormal"),
    "elementwise": ("mixture_cdf", "mix_logit_cdf", "invert_increasing", "Shift", "Affine", "MixLogitCDF"),
    "coupling": ("Coupling", "AdditiveCoupling", "MixCoupling"),
    "linear": ("Reverse", "Permute", "ActNorm", "InvertibleLinear"),
    "nets": ("MLP",),
    "training": ("fit", "kl_gap", "History"),
    "toys": (),
    "live": (),
    "plotting": (),
    "settings": (),
    "live": (),
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
