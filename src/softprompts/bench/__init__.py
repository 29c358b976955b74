"""Benchmarks: training steps, generation and serving against PEFT, the plain model, and the floor."""

from softprompts.bench.generate import GenerateBench, measure_generation
from softprompts.bench.serve import ServeBench, measure_serving
from softprompts.bench.train import TrainBench, measure_training
from softprompts.bench.workload import RANDOM_GPT2, random_gpt2

__all__ = [
    "RANDOM_GPT2",
    "GenerateBench",
    "ServeBench",
    "TrainBench",
    "measure_generation",
    "measure_serving",
    "measure_training",
    "random_gpt2",
]
