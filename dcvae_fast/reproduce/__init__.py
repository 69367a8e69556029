"""`dcvae reproduce`: train and measure the models of the paper's tables and Figure 7, and write the pages."""

from dcvae_fast.reproduce.paper import TABLES, WITH_OFFICIAL
from dcvae_fast.reproduce.runs import plan, reproduce, trainings

__all__ = ["TABLES", "WITH_OFFICIAL", "plan", "reproduce", "trainings"]
