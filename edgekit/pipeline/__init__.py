"""The way through edgekit: recipe -> run folder -> target -> artifact -> verdict.

`distill` makes a run folder from a recipe, `compile` makes bundles from a run folder or a model, `verify` makes a
report from a bundle; each is a module of this package, and `whole.run_recipe` is the three in one. Nothing is imported
here, so that `baseline` runs where pydantic is not installed.
"""
