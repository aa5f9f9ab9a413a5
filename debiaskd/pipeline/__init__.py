"""The stages of a recipe in order: teacher, identification, weights, teacher outputs, student."""
