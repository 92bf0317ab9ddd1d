"""The laboratory's report: the paper's claims against what the seeds found, as Markdown and as a page with plots."""
