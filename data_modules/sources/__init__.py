"""Ways in: other people's corpora, turned into LitData chunks and an index."""
