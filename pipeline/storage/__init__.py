"""Files, near and far: written whole, read without waiting, fetched again where a connection breaks.

Owns: atomic writes, locks, late shared disks; downloads and their retries; the user's cache folder; what may be overwritten.
May import: errors, text. Knows nothing of artifacts or images.
"""
