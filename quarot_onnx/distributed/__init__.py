"""Work on other machines: Dask's scheduler, what its workers must share with us, tasks whose results come in order."""
