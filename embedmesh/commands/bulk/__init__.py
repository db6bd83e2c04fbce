"""`embedmesh embed`, taken apart: lines in (`lines`), requests (`client`), rows out (`output`), the story (`run`)."""
