"""What the figures in the docs come from: one command each.

A bench is a module whose function `measure` returns figures that know which promises they break (`broken`). The
parameters of `measure` are the command's options, the fields of the figures its tables: `bench.rig.command.bench` makes
a command of both. What benches share is in `bench.rig`.
"""
