"""What one GPU does with the full-size networks: `make gpu-day`, or `make gpu-day STEP="1 4"`.

Each step is a module with `rows()`: names of rows, and for each what measures it. A step runs in a process of its own and
is ended after `LIMIT` seconds. Rows go to docs/bench/NAME.json, where NAME is the GPU's, or to the folder OUT. TINY=1 tries
every step with tiny networks, on a CPU too; its figures say nothing.
"""
