"""Widgets: the device-map explorer, the memory monitor and the chat panel, for ipywidgets 7.7.1 to 8.1."""

from glmhelpers.widgets.chat_panel import ChatPanel
from glmhelpers.widgets.explorer import Explorer
from glmhelpers.widgets.explorer_words import Measured
from glmhelpers.widgets.monitor import Monitor

__all__ = ["ChatPanel", "Explorer", "Measured", "Monitor"]
