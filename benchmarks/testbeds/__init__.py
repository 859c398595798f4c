"""Test beds: each has a pretrained model, few-shot images, and held-out images on which students are measured.

bed = dinov2(seed=0)
result = dcvit.compress(bed.model, bed.images, dcvit.Budget(macs=0.75))
measure(bed, result.model)
"""

from benchmarks.testbeds.bed import TestBed
from benchmarks.testbeds.beds import digits, dinov2, efficientnet, photographs, resnet, swin
from benchmarks.testbeds.measures import Measures, measure

__all__ = ["Measures", "TestBed", "digits", "dinov2", "efficientnet", "measure", "photographs", "resnet", "swin"]
