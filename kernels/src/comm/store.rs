//! The key-value store that ranks meet in: libtorch's TCPStore.

use crate::abi::*;
use crate::error::{Error, Result, c_string, check};
use std::ffi::c_char;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::IntoRawFd;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

pub(crate) fn millis(d: Duration) -> i64 {
    d.as_millis().clamp(1, i64::MAX as u128 / 2) as i64
}

/// Bytes under string keys, shared by all ranks: served by one process over TCP, reached by all. Every call is an error once
/// that process is gone.
pub struct Store {
    raw: *mut StorePtr,
    host: String,
    port: u16,
    timeout: Duration,
}

// SAFETY: c10d's TCPStore locks every operation; the handle itself is never changed.
unsafe impl Send for Store {}
// SAFETY: as for Send.
unsafe impl Sync for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the C ABI and is freed once.
        unsafe { corral_store_free(self.raw) }
    }
}

impl Store {
    /// Serves the store on `port` (0: any free one) if `is_server`, else connects to it, for at most `timeout`.
    ///
    /// Errors name the address: the port is in use, the host is unknown, or nobody answers.
    pub fn tcp(host: &str, port: u16, is_server: bool, timeout: Duration) -> Result<Store> {
        let (port, fd) = if is_server {
            let listener = listen(host, port)?;
            let port = listener.local_addr().map_err(|e| Error::new(e.to_string()))?.port();
            (port, listener.into_raw_fd())
        } else {
            await_server(host, port, timeout)?;
            (port, -1)
        };
        let name = c_string(host)?;
        let mut raw = null_mut();
        // SAFETY: the strings outlive the call; `raw` is written before it returns without error.
        check(unsafe { corral_store_tcp(name.as_ptr(), port, fd, millis(timeout), &mut raw) })
            .map_err(|e| e.context(format!("the store at {host}:{port}")))?;
        Ok(Store { raw, host: host.into(), port, timeout })
    }

    /// The port that the store is served on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The same store, every key with `prefix` before it.
    pub fn prefix(&self, prefix: &str) -> Result<Store> {
        let prefix = c_string(prefix)?;
        // SAFETY: as in `tcp`.
        self.derive(|out| unsafe { corral_store_prefix(self.raw, prefix.as_ptr(), out) })
    }

    /// A connection of its own to the same store, so that a call that blocks on one does not block the other.
    /// An error at once if the server is gone.
    pub fn reconnect(&self) -> Result<Store> {
        let address = resolve(&self.host, self.port)?;
        connect_any(&address, Duration::from_secs(2))
            .map_err(|e| Error::new(format!("no store at {}: {e}", self.address())))?;
        // SAFETY: as in `tcp`.
        self.derive(|out| unsafe { corral_store_reconnect(self.raw, out) })
    }

    fn derive(&self, make: impl FnOnce(*mut *mut StorePtr) -> *mut c_char) -> Result<Store> {
        let mut raw = null_mut();
        check(make(&mut raw))?;
        Ok(Store { raw, host: self.host.clone(), port: self.port, timeout: self.timeout })
    }

    /// Sets the value of `key`, which others may wait for.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let key = c_string(key)?;
        // SAFETY: pointers and length describe `value`, which outlives the call.
        check(unsafe { corral_store_set(self.raw, key.as_ptr(), value.as_ptr(), value.len()) })
    }

    /// The value of `key`; waits until it is there, at most the store's time-out.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.get_within(key, self.timeout)
    }

    /// The value of `key`; waits until it is there, at most `timeout`.
    pub fn get_within(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let c_key = c_string(key)?;
        let (mut data, mut size) = (null_mut(), 0);
        // SAFETY: on success `data` is a malloc'ed buffer of `size` bytes, copied and freed here.
        unsafe {
            check(corral_store_get(self.raw, c_key.as_ptr(), millis(timeout), &mut data, &mut size))
                .map_err(|e| e.context(format!("key {key:?} of the store at {}", self.address())))?;
            let value = std::slice::from_raw_parts(data, size).to_vec();
            corral_free(data.cast());
            Ok(value)
        }
    }

    /// Adds to the integer under `key` (0 if absent), and returns the sum.
    pub fn add(&self, key: &str, value: i64) -> Result<i64> {
        let key = c_string(key)?;
        let mut sum = 0;
        // SAFETY: `sum` is written before the call returns.
        check(unsafe { corral_store_add(self.raw, key.as_ptr(), value, &mut sum) })?;
        Ok(sum)
    }

    /// Whether `key` is there; does not wait.
    pub fn check(&self, key: &str) -> Result<bool> {
        let key = c_string(key)?;
        let mut there = 0;
        // SAFETY: `there` is written before the call returns.
        check(unsafe { corral_store_check(self.raw, key.as_ptr(), &mut there) })?;
        Ok(there != 0)
    }

    pub(crate) fn raw(&self) -> *const StorePtr {
        self.raw
    }

    /// The address by which the other ranks reach this host: that of the interface towards the store. (c10d's default resolves
    /// the host's own name, which fails on many machines and gives 127.0.1.1 on others.)
    pub(crate) fn local_address(&self) -> Result<IpAddr> {
        let towards = |to: SocketAddr| -> std::io::Result<IpAddr> {
            let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(to)?; // UDP: chooses a route, sends nothing
            Ok(socket.local_addr()?.ip())
        };
        let server = resolve(&self.host, self.port)?[0];
        let mut found = towards(server);
        if found.as_ref().is_ok_and(|a| a.is_loopback()) && !is_loopback(&self.host) {
            // The server's own host may know its name by a loopback address: take the default route's interface.
            found = towards(SocketAddr::from(([192, 0, 2, 1], 9))).or(found);
        }
        found.map_err(|e| {
            Error::new(format!(
                "cannot tell this host's address towards {server}: {e}; set GLOO_SOCKET_IFNAME"
            ))
        })
    }
}

/// An address that only this host can reach.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// A loopback address is bound as it is. Any other may be a name that this host knows by another address (127.0.1.1 in
/// Debian's /etc/hosts, a service name of a cluster): all interfaces are bound.
fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let bound = if is_loopback(host) {
        TcpListener::bind((host, port))
    } else {
        TcpListener::bind(("::", port)).or_else(|e| match e.kind() {
            std::io::ErrorKind::AddrInUse => Err(e),
            _ => TcpListener::bind(("0.0.0.0", port)),
        })
    };
    bound.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(format!(
            "port {port} on {host} is in use: another run, or one that has not ended yet; choose another one \
             (MASTER_PORT, or launch --rdzv HOST:PORT)"
        )),
        _ => Error::new(format!("cannot serve the store on {host}:{port}: {e}")),
    })
}

fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let found = (host, port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    match found {
        Ok(addresses) if !addresses.is_empty() => Ok(addresses),
        Ok(_) => Err(Error::new(format!("the host {host} has no address (MASTER_ADDR)"))),
        Err(e) => Err(Error::new(format!("the host {host} is unknown (MASTER_ADDR): {e}"))),
    }
}

fn connect_any(addresses: &[SocketAddr], timeout: Duration) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("no address");
    for address in addresses {
        match TcpStream::connect_timeout(address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Tries until the server listens: libtorch's client would try as well, but fill the log with warnings meanwhile.
fn await_server(host: &str, port: u16, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        // A name may not resolve before the other host is up.
        let tried = resolve(host, port).and_then(|a| {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(50));
            connect_any(&a, left.min(Duration::from_secs(10))).map_err(|e| Error::new(e.to_string()))
        });
        match tried {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() >= deadline => {
                return Err(Error::new(format!(
                    "rank 0 does not answer at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout:?}: it has not \
                     started, has ended, or cannot be reached from here: {e}"
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
