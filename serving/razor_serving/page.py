"""The page at /razor: one static file, which reads the routes and /metrics from the browser."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("razor.html")

router = APIRouter()


def content_security_policy(html: str) -> str:
    """A content security policy that allows the page's own script and style, and nothing else."""

    def digests(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


@router.get("/razor", response_class=HTMLResponse, include_in_schema=False)
async def get_page() -> HTMLResponse:
    """The page; it has no figures in it."""
    html = _FILE.read_text(encoding="utf-8")
    return HTMLResponse(
        html,
        headers={
            "Content-Security-Policy": content_security_policy(html),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )
