"""`dcvae reproduce`: train and measure the models of the paper's tables and figures, and write the pages."""

from dcvae_fast.reproduce.figures import reproduce_figure
from dcvae_fast.reproduce.paper import FIGURES, TABLES, WITH_OFFICIAL
from dcvae_fast.reproduce.runs import plan, reproduce, trainings

__all__ = ["FIGURES", "TABLES", "WITH_OFFICIAL", "plan", "reproduce", "reproduce_figure", "trainings"]
