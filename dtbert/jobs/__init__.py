"""Many questions: the lines of their files, and jobs that answer them block by block on a cluster."""
