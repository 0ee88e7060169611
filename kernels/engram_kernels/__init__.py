"""Pure functions of tensors. `reference` defines every op; each fast op stands in a file of its own name.

Nothing here knows the rest of the project, and importing the package loads no compiler.
"""
