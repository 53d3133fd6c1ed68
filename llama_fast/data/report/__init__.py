"""What the steps did to the documents, as JSON, as Markdown, and as a page that needs nothing else."""
