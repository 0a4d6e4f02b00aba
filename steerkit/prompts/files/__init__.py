"""One reader for every file of prompts, pairs or labelled prompts, whatever its format.

`source` gets the bytes of a file or of stdin, `reading` tells from them what the file is and gives its rows
(`json_rows`, `csv_rows`, `tables`), `columns` finds what a row has by its usual names. `prompts`, `pairs` and
`labelled` make conversations of rows, `sides` makes both sides of a contrast of a file, `telling` says once what looks
wrong.
"""

from __future__ import annotations
