"""What each GPU holds in a training step: the names of `cost_model.step_memory`, under a name that is easy to find."""

from glmhelpers.cost_model.step_memory import *  # noqa: F403
