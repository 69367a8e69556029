"""`dcvae reproduce`: train and measure what the paper's tables and Figure 7 show, and write the pages."""

from dcvae_fast.reproduce.paper import TABLES
from dcvae_fast.reproduce.runs import plan, reproduce, trainings

__all__ = ["TABLES", "plan", "reproduce", "trainings"]
