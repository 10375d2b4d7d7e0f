"""The suites of `recipes.bench`, and the peers they are measured against."""
