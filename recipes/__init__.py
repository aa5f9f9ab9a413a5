"""The papers' settings, by name: `debiaskd train waterbirds_dett`. Their first lines say what they are."""
