"""The Engram tables: which shard owns which rows, their initial values, and the rows in host memory.

All heads of all Engram layers form one joined row space: row ids 0 .. total_rows - 1, every row `row_dim` wide.
"""
