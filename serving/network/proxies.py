"""Reverse proxies: which peers are trusted to send `X-Forwarded-*` headers, and the client address behind them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

_MAX_HOPS = 32  # addresses of an X-Forwarded-For header that are examined, from the right


class TrustedProxies:
    """The addresses and networks of the option `trusted_proxies`."""

    def __init__(self, networks: Sequence[str]) -> None:
        """Raises `ValueError` if an entry is neither an address nor a network."""
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def __contains__(self, address: str) -> bool:
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def client(self, peer: str, forwarded_for: str) -> str:
        """Return the address of the client behind `peer`: the last one in `forwarded_for` that is not a trusted proxy.

        Each proxy appends the address of its own peer, so entries further to the left come from the client. Returns
        `peer` if it is not trusted, or if the header is missing or malformed.
        """
        if peer not in self:
            return peer
        address = peer
        for hop in reversed(forwarded_for.split(",")[-_MAX_HOPS:]):
            parsed = _parse(hop)
            if parsed is None:
                break
            address = str(parsed)
            if address not in self:
                break
        return address


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an address, with or without a port (`192.0.2.1:80`, `[2001:db8::1]:80`); None if it is invalid."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
