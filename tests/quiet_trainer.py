"""A Trainer on the CPU that neither writes nor prints, for tests of what it trains."""

import lightning as L


def quiet_trainer(**options):
    quiet = dict(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return L.Trainer(**(quiet | options))
