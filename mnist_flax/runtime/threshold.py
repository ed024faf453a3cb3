"""The flag `--threshold`, of the commands that answer."""

from absl import flags

FLAG = flags.DEFINE_float(
    "threshold",
    None,
    "least probability of an answer, below which it is '?'; by default what calibration on validation data gives.",
    lower_bound=0.0,
    upper_bound=1.0,
)
