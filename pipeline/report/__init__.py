"""One HTML page from one evaluation or several: plots, pictures to compare, tables, and how it was made.

Owns: what a page shows of an evaluation, the pictures inside it, the page's template, style and scripts; crops side by side.
May import: evaluation, registry, tracking, artifacts, storage. Measures nothing.
"""
