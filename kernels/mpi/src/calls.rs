//! MPI's functions, as this engine uses them. Called by the thread of MPI alone.

use std::ffi::{c_char, c_int, c_void};

use mpi::ffi;
use mpi::traits::AsRaw;
use tch::{Device, Tensor};

use kernels::{Error, Result};

/// Ranks that MPI connects. Only a name: it is made and freed by the thread of MPI.
#[derive(Clone, Copy)]
pub(super) struct Communicator {
    raw: ffi::MPI_Comm,
    /// This process in it.
    pub(super) rank: usize,
    pub(super) size: usize,
    /// This process among all.
    pub(super) world_rank: i64,
}

// SAFETY: it is only a name for all threads but that of MPI.
unsafe impl Send for Communicator {}
// SAFETY: as for Send.
unsafe impl Sync for Communicator {}

fn check(code: c_int) -> Result<()> {
    // MPI_SUCCESS is 0 in every MPI.
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: `text` has the length that MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    Err(Error::new(String::from_utf8_lossy(&text[..length.max(0) as usize]).into_owned()))
}

/// How many processes MPI has started.
pub(super) fn world_size(world: &impl AsRaw<Raw = ffi::MPI_Comm>) -> Result<i64> {
    let mut size = 0;
    // SAFETY: the communicator is alive.
    check(unsafe { ffi::MPI_Comm_size(world.as_raw(), &mut size) })?;
    Ok(size.into())
}

/// Errors of `world` come back as codes, instead of ending the process.
pub(super) fn return_errors(world: &impl AsRaw<Raw = ffi::MPI_Comm>) -> Result<()> {
    // SAFETY: the communicator is alive.
    check(unsafe { ffi::MPI_Comm_set_errhandler(world.as_raw(), ffi::RSMPI_ERRORS_RETURN) })
}

impl Communicator {
    /// Of these ranks of `world`, all of which call this with the same `tag`.
    pub(super) fn of(
        world: &impl AsRaw<Raw = ffi::MPI_Comm>,
        ranks: &[c_int],
        tag: c_int,
    ) -> Result<Communicator> {
        let world = world.as_raw();
        // SAFETY: constants of MPI.
        let (mut all, mut some, mut raw) =
            unsafe { (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL, ffi::RSMPI_COMM_NULL) };
        let (mut rank, mut size, mut world_rank) = (0, 0, 0);
        // SAFETY: `world` is alive, ranks and their number belong together, and results are written before they are read.
        unsafe {
            check(ffi::MPI_Comm_group(world, &mut all))?;
            let made = check(ffi::MPI_Group_incl(all, ranks.len() as c_int, ranks.as_ptr(), &mut some))
                .and_then(|()| check(ffi::MPI_Comm_create_group(world, some, tag, &mut raw)));
            ffi::MPI_Group_free(&mut all);
            made?;
            ffi::MPI_Group_free(&mut some);
            check(ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(raw, &mut rank))?;
            check(ffi::MPI_Comm_size(raw, &mut size))?;
            check(ffi::MPI_Comm_rank(world, &mut world_rank))?;
        }
        Ok(Communicator { raw, rank: rank as usize, size: size as usize, world_rank: world_rank.into() })
    }

    /// Frees it; nothing is under way.
    pub(super) fn free(mut self) {
        // SAFETY: made by `of`, freed once. Nothing to do about an error: it is gone either way.
        let _ = unsafe { ffi::MPI_Comm_free(&mut self.raw) };
    }

    /// Sends `t` to rank `to` of the group.
    pub(super) fn send(self, t: &Tensor, to: usize, tag: c_int) -> Result<Request> {
        let (data, count, kind) = buffer(t)?;
        // SAFETY: the request keeps the tensor, and so its memory.
        Request::begin(&[t], |r| unsafe { ffi::MPI_Isend(data, count, kind, to as c_int, tag, self.raw, r) })
    }

    /// Overwrites `t` with what rank `from` of the group sends.
    pub(super) fn receive(self, t: &Tensor, from: usize, tag: c_int) -> Result<Request> {
        let (data, count, kind) = buffer(t)?;
        // SAFETY: as in `send`.
        Request::begin(&[t], |r| unsafe {
            ffi::MPI_Irecv(data, count, kind, from as c_int, tag, self.raw, r)
        })
    }

    /// Overwrites `t` on all ranks with that of rank `root`.
    pub(super) fn broadcast(self, t: &Tensor, root: i64) -> Result<Request> {
        let (data, count, kind) = buffer(t)?;
        // SAFETY: as in `send`.
        Request::begin(&[t], |r| unsafe { ffi::MPI_Ibcast(data, count, kind, root as c_int, self.raw, r) })
    }
}

/// What MPI has begun. It keeps the tensors until it is done.
pub(super) struct Request {
    raw: ffi::MPI_Request,
    tensors: Vec<Tensor>,
}

// SAFETY: MPI is asked about it by the thread of MPI alone, to which it moves.
unsafe impl Send for Request {}

impl Request {
    fn begin(tensors: &[&Tensor], call: impl FnOnce(*mut ffi::MPI_Request) -> c_int) -> Result<Request> {
        // SAFETY: a constant of MPI.
        let mut raw = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(call(&mut raw))?;
        Ok(Request { raw, tensors: tensors.iter().map(|t| t.shallow_clone()).collect() })
    }

    /// Whether it is done; MPI goes on with all that is under way.
    fn is_done(&mut self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the request is alive; a done one is null, which MPI calls done, too.
        check(unsafe { ffi::MPI_Test(&mut self.raw, &mut done, ffi::RSMPI_STATUS_IGNORE) })?;
        if done != 0 {
            self.tensors.clear();
        }
        Ok(done != 0)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // Only after an error. MPI may still write there: the memory stays.
        std::mem::take(&mut self.tensors).into_iter().for_each(std::mem::forget);
    }
}

/// Whether all are done; those that are, are removed.
pub(super) fn all_done(requests: &mut Vec<Request>) -> Result<bool> {
    let mut error = None;
    requests.retain_mut(|request| match request.is_done() {
        Ok(done) => !done,
        Err(e) => {
            error = Some(e);
            true
        }
    });
    error.map_or(Ok(requests.is_empty()), Err)
}

/// Where a tensor lies, and how many elements of which size it has: MPI moves them as they are.
fn buffer(t: &Tensor) -> Result<(*mut c_void, c_int, ffi::MPI_Datatype)> {
    if t.device() != Device::Cpu || !t.is_contiguous() {
        return Err(Error::new(format!(
            "MPI takes contiguous tensors in host memory, not {:?} on {:?}",
            t.size(),
            t.device()
        )));
    }
    let count = c_int::try_from(t.numel()).map_err(|_| {
        Error::new(format!("MPI moves at most {} elements at once, not {}", c_int::MAX, t.numel()))
    })?;
    // SAFETY: constants of MPI.
    let kind = unsafe {
        match t.kind().elt_size_in_bytes() {
            1 => ffi::RSMPI_UINT8_T,
            2 => ffi::RSMPI_UINT16_T,
            4 => ffi::RSMPI_UINT32_T,
            8 => ffi::RSMPI_UINT64_T,
            size => return Err(Error::new(format!("MPI moves no elements of {size} bytes"))),
        }
    };
    Ok((t.data_ptr(), count, kind))
}
