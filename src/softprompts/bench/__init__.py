"""Benchmarks: training steps and generation against PEFT, the plain model, and the floor."""

from softprompts.bench.generate import GenerateBench, measure_generation
from softprompts.bench.train import TrainBench, measure_training
from softprompts.bench.workload import RANDOM_GPT2, random_gpt2

__all__ = ["RANDOM_GPT2", "GenerateBench", "TrainBench", "measure_generation", "measure_training", "random_gpt2"]
