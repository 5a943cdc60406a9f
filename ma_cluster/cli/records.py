"""Commands on what goes into a hospital's records: results as DICOM, and the audit of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from ma_cluster.cli.app import INCOMPLETE, Dest, app


@app.command()
def dicom(
    dest: Dest,
    to: Annotated[
        str | None, typer.Option(metavar="URL", help="Send them to this server, too: dicomweb+https://host/path.")
    ] = None,
) -> None:
    """Write a run's results as DICOM: DEST/dicom/NAME.seg.dcm (mask), .sr.dcm (report) and .sc.dcm (overlay).

    For photographs that came as DICOM; `score --dicom` does it meanwhile. What is there, or on the server, stays as it
    is. Credentials: DICOMWEB_TOKEN, or DICOMWEB_USER and DICOMWEB_PASSWORD; they go to DICOMWEB_HOST alone.
    """
    from ma_cluster.archive.dicom_export import DicomExport
    from ma_cluster.archive.summary import open_run
    from ma_cluster.config import ImageConfig
    from ma_cluster.images.sandbox import DecodePool, SandboxConfig
    from ma_cluster.storage.dicomweb import DicomWeb
    from ma_cluster.storage.manifest import open_source

    store, run = open_run(dest)
    server = None if to is None else DicomWeb(to)
    image = ImageConfig()
    pool = DecodePool(image, SandboxConfig())
    try:
        export = DicomExport(open_source(run.source), store, run, pool.decode, image.max_bytes, server)
        exported = export.all()
    finally:
        pool.close()
    typer.echo(f"{exported.written} results as DICOM, {store.url}/dicom")
    if server is not None:
        typer.echo(f"{exported.sent} of them new on the server")
    if exported.no_dicom:
        typer.echo(f"{exported.no_dicom} photographs are of other files than DICOM")
    if exported.failed:
        why = "could not be read again, have a header that does not fit, or were refused by the server"
        typer.echo(f"{exported.failed} photographs {why}")
        raise typer.Exit(INCOMPLETE)


@app.command()
def audit(
    dest: Dest,
    masks: Annotated[
        bool, typer.Option("--masks", help="Read the masks, too, and hold each against its digest.")
    ] = False,
) -> None:
    """Check a run's audit: DEST/audit, one line a result, each with the hash of the line before.

    Prints how many results there are, and one hash over all of them: noted elsewhere, it proves later that none was
    changed. What is missing, too much or was changed is named, each in a line, and the exit status is 1.
    """
    from ma_cluster.archive.audit import check_audit
    from ma_cluster.archive.summary import open_run

    checked = check_audit(*open_run(dest), masks=masks)
    typer.echo(f"{checked.results} results, {checked.sha256}")
    if checked.undecided:
        typer.echo(f"{checked.undecided} photographs of the plan have no result yet")
    for fault in checked.faults:
        typer.echo(fault, err=True)
    if checked.faults:
        raise typer.Exit(1)
