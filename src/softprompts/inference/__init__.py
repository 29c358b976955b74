"""Decoding: the one generation path of training, evaluation and serving."""

from softprompts.inference.beam import BeamSearch
from softprompts.inference.engine import Engine, Generation
from softprompts.inference.sampling import Constraints, OnePath, banned_sequences, draw, warp

__all__ = ["BeamSearch", "Constraints", "Engine", "Generation", "OnePath", "banned_sequences", "draw", "warp"]
