"""A real Slurm cluster of several nodes on one machine, for tests and for tries (`docs/local_cluster.md`).

Start reading at `cluster.py`. A node is a set of Linux namespaces with a slurmd inside, or a plain process tree where
namespaces are not allowed.
"""
