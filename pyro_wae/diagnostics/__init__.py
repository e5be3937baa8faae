"""Do codes match the prior? Tests on plain tensors, a report on a model and its guide, and the quality of samples."""

from pyro_wae.diagnostics.alarms import Alarm
from pyro_wae.diagnostics.classifier import ClassifierTest, classifier_test
from pyro_wae.diagnostics.comparison import Comparison, Coverage, Moments, Noise, WorstDirection
from pyro_wae.diagnostics.example_images import Pictures
from pyro_wae.diagnostics.gathering import BatchNormComparison, CostSummary
from pyro_wae.diagnostics.report import Report, report
from pyro_wae.diagnostics.sample_quality import PrecisionRecall, precision_recall, sample_quality
from pyro_wae.diagnostics.two_sample import TwoSampleTest, two_sample_test

__all__ = [
    "Alarm",
    "BatchNormComparison",
    "ClassifierTest",
    "Comparison",
    "CostSummary",
    "Coverage",
    "Moments",
    "Noise",
    "Pictures",
    "PrecisionRecall",
    "Report",
    "TwoSampleTest",
    "WorstDirection",
    "classifier_test",
    "precision_recall",
    "report",
    "sample_quality",
    "two_sample_test",
]
