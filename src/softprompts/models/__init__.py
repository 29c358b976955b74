"""The frozen model and the seam through which a prompt enters it."""

from softprompts.models.attention import Steering
from softprompts.models.cache import DecodeState
from softprompts.models.frozen import FrozenLM

__all__ = ["DecodeState", "FrozenLM", "Steering"]
