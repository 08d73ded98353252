//! Device memory that one tensor's storage owns, and copies between it and the host.

use std::any::Any;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use kasmina_driver::cust_raw::{CUDA_MEMCPY2D, CUmemorytype};

use super::pool::SizeClass;
use super::{Stream, driver};
use crate::error::Result;
use crate::stream::Operation;
use crate::tensor::Region;

/// The largest distance between rows that one copy of several rows may have: what the driver
/// reports as `CU_DEVICE_ATTRIBUTE_MAX_PITCH` on every GPU so far.
const MAX_PITCH: usize = i32::MAX as usize;

/// Device memory; where it came from decides where it goes.
pub(crate) struct Buffer {
    stream: Arc<Stream>,
    address: u64,
    bytes: usize,
    origin: Origin,
}

enum Origin {
    Empty,
    Pool(SizeClass),
    /// Held for its destructor.
    Foreign {
        owner: Arc<dyn Any + Send + Sync>,
    },
}

/// Which way a copy goes, with the host's end of it.
#[derive(Clone, Copy)]
enum Copy {
    ToHost(*mut u8),
    ToDevice(*const u8),
}

impl Buffer {
    pub(super) const fn empty(stream: Arc<Stream>) -> Self {
        Self { stream, address: 0, bytes: 0, origin: Origin::Empty }
    }

    /// A block of `class` from the stream's pool.
    pub(super) const fn pooled(
        stream: Arc<Stream>,
        address: u64,
        bytes: usize,
        class: SizeClass,
    ) -> Self {
        Self { stream, address, bytes, origin: Origin::Pool(class) }
    }

    /// Memory that `owner` keeps alive.
    ///
    /// # Safety
    /// While `owner` lives, there are `bytes` bytes of memory of the stream's GPU at `address`.
    pub(crate) unsafe fn foreign(
        stream: &Arc<Stream>,
        address: u64,
        bytes: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let origin = Origin::Foreign { owner };
        Self { stream: Arc::clone(stream), address, bytes, origin }
    }

    pub(crate) const fn address(&self) -> u64 {
        self.address
    }

    /// Whether [`read`](Self::read) would wait for nothing but its copy.
    pub(crate) fn is_ready(&self) -> Result<bool> {
        self.stream.is_idle()
    }

    /// Copies rows to the host, one after the other, and waits for it.
    pub(crate) fn read(&self, region: Region, target: &mut [u8]) -> Result<()> {
        // SAFETY: the exclusive borrow of `target` outlasts the copy, which `copy` waits for.
        unsafe { self.copy(region, target.len(), Copy::ToHost(target.as_mut_ptr())) }
    }

    /// Copies rows from the host, where they follow each other, and waits for it: memory that the
    /// caller has page-locked would otherwise be read after this returns.
    pub(crate) fn write(&self, region: Region, source: &[u8]) -> Result<()> {
        // SAFETY: the borrow of `source` outlasts the copy, which `copy` waits for.
        unsafe { self.copy(region, source.len(), Copy::ToDevice(source.as_ptr())) }
    }

    /// # Safety
    /// The host's end is valid for `host_bytes` bytes, for writing when that is where they go.
    unsafe fn copy(&self, region: Region, host_bytes: usize, copy: Copy) -> Result<()> {
        let bytes = region.rows * region.row_bytes;
        assert_eq!(bytes, host_bytes, "host memory does not match the region");
        let start = self.start_of(region);
        self.stream.gpu().bind()?;
        // SAFETY: as above; the host's end is valid until the wait below, which nothing skips.
        let enqueued = unsafe { self.enqueue(region, start, host_bytes, copy) };
        // Also after a failure: rows before the one that failed may still be on their way.
        let waited = self.stream.synchronize();
        enqueued.and(waited)
    }

    /// The address of the region's first row.
    fn start_of(&self, region: Region) -> u64 {
        let Region { offset, rows, row_bytes, row_stride } = region;
        // A tensor's region lies within its storage; checked again because memory depends on it.
        assert!(
            rows == 0 || offset + (rows - 1) * row_stride + row_bytes <= self.bytes,
            "the region reaches beyond the buffer"
        );
        self.address + offset as u64
    }

    /// Enqueues a copy of rows of `source`, whose stream has to be ordered around this one, and which
    /// share no byte with those they replace.
    pub(crate) fn copy_from(&self, region: Region, source: &Self, from: Region) -> Result<()> {
        let Region { rows, row_bytes, row_stride, .. } = region;
        assert_eq!([rows, row_bytes], [from.rows, from.row_bytes], "the regions differ");
        let (target, origin) = (self.start_of(region), source.start_of(from));
        self.stream.gpu().bind()?;
        let stream = self.stream.raw();
        let copy_bytes = |target, origin, bytes| {
            // SAFETY: both buffers hold these bytes, as asserted in `start_of`, and neither is reused
            // before the stream has run this: memory is given away in the order of the streams.
            unsafe { driver!(cuMemcpyDtoDAsync_v2(target, origin, bytes, stream)) }
        };
        let packed = |region: Region| rows == 1 || region.row_stride == row_bytes;
        let enqueued = if packed(region) && packed(from) {
            copy_bytes(target, origin, rows * row_bytes)
        } else if row_stride.max(from.row_stride) <= MAX_PITCH {
            let descriptor = CUDA_MEMCPY2D {
                srcXInBytes: 0,
                srcY: 0,
                srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
                srcHost: ptr::null(),
                srcDevice: origin,
                srcArray: ptr::null_mut(),
                srcPitch: from.row_stride,
                dstXInBytes: 0,
                dstY: 0,
                dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
                dstHost: ptr::null_mut(),
                dstDevice: target,
                dstArray: ptr::null_mut(),
                dstPitch: row_stride,
                WidthInBytes: row_bytes,
                Height: rows,
            };
            // SAFETY: as above, row by row; the driver reads the descriptor during the call.
            unsafe { driver!(cuMemcpy2DAsync_v2(&raw const descriptor, stream)) }
        } else {
            (0..rows).try_for_each(|row| {
                let (target_row, origin_row) = (row * row_stride, row * from.row_stride);
                copy_bytes(target + target_row as u64, origin + origin_row as u64, row_bytes)
            })
        };
        enqueued.map_err(|error| self.stream.failed(error))?;
        self.stream.note(Operation::Copy);
        Ok(())
    }

    /// # Safety
    /// Both ends are valid for the region until the stream has run the copies.
    unsafe fn enqueue(
        &self,
        region: Region,
        start: u64,
        host_bytes: usize,
        copy: Copy,
    ) -> Result<()> {
        let Region { rows, row_bytes, row_stride, .. } = region;
        if rows == 1 || row_stride == row_bytes {
            // SAFETY: both ends hold `host_bytes` bytes, as asserted above.
            return unsafe { self.copy_bytes(start, copy, host_bytes) };
        } else if row_stride <= MAX_PITCH {
            // SAFETY: both ends hold the rows, as asserted above.
            return unsafe { self.copy_rows(start, copy, region) };
        } else {
            for row in 0..rows {
                // SAFETY: row by row within the bytes asserted above.
                unsafe {
                    let host = copy.skip(row * row_bytes);
                    self.copy_bytes(start + (row * row_stride) as u64, host, row_bytes)
                }?;
            }
        }
        Ok(())
    }

    /// # Safety
    /// Both ends are valid for `bytes` bytes until the stream has run the copy.
    unsafe fn copy_bytes(&self, device: u64, copy: Copy, bytes: usize) -> Result<()> {
        let stream = self.stream.raw();
        // SAFETY: the caller vouches for both ends; the stream lives as long as `self`.
        let enqueued = unsafe {
            match copy {
                Copy::ToHost(host) => {
                    driver!(cuMemcpyDtoHAsync_v2(host.cast(), device, bytes, stream))
                }
                Copy::ToDevice(host) => {
                    driver!(cuMemcpyHtoDAsync_v2(device, host.cast(), bytes, stream))
                }
            }
        };
        enqueued.map_err(|error| self.stream.failed(error))
    }

    /// # Safety
    /// Both ends are valid for the region's rows until the stream has run the copy.
    unsafe fn copy_rows(&self, device: u64, copy: Copy, region: Region) -> Result<()> {
        let Region { rows, row_bytes, row_stride, .. } = region;
        let mut descriptor = CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: ptr::null(),
            srcDevice: device,
            srcArray: ptr::null_mut(),
            srcPitch: row_stride,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: device,
            dstArray: ptr::null_mut(),
            dstPitch: row_stride,
            WidthInBytes: row_bytes,
            Height: rows,
        };
        match copy {
            Copy::ToHost(host) => {
                descriptor.dstMemoryType = CUmemorytype::CU_MEMORYTYPE_HOST;
                descriptor.dstHost = host.cast::<c_void>();
                descriptor.dstPitch = row_bytes;
            }
            Copy::ToDevice(host) => {
                descriptor.srcMemoryType = CUmemorytype::CU_MEMORYTYPE_HOST;
                descriptor.srcHost = host.cast::<c_void>();
                descriptor.srcPitch = row_bytes;
            }
        }
        // SAFETY: the descriptor names rows that the caller vouches for; the driver reads it
        // during the call.
        unsafe { driver!(cuMemcpy2DAsync_v2(&raw const descriptor, self.stream.raw())) }
            .map_err(|error| self.stream.failed(error))
    }

    /// Fills the buffer with `count` copies of an element of 2 or 4 bytes.
    pub(crate) fn fill(&self, element: &[u8], count: usize) -> Result<()> {
        assert!(count * element.len() <= self.bytes, "the fill reaches beyond the buffer");
        if count == 0 {
            return Ok(());
        }
        self.stream.gpu().bind()?;
        let stream = self.stream.raw();
        let enqueued = match *element {
            [a, b] => {
                let value = u16::from_ne_bytes([a, b]);
                // SAFETY: the buffer holds `count` elements of 2 bytes, as asserted above, and is
                // not reused before the stream has run this.
                unsafe { driver!(cuMemsetD16Async(self.address, value, count, stream)) }
            }
            [a, b, c, d] => {
                let value = u32::from_ne_bytes([a, b, c, d]);
                // SAFETY: as above, with 4 bytes.
                unsafe { driver!(cuMemsetD32Async(self.address, value, count, stream)) }
            }
            _ => unreachable!("element types have 2 or 4 bytes"),
        };
        enqueued.map_err(|error| self.stream.failed(error))?;
        self.stream.note(Operation::Fill);
        Ok(())
    }
}

impl Copy {
    /// The same copy with the host's end `bytes` further on.
    ///
    /// # Safety
    /// That is still within the host's memory.
    unsafe fn skip(self, bytes: usize) -> Self {
        // SAFETY: the caller vouches for it.
        unsafe {
            match self {
                Self::ToHost(host) => Self::ToHost(host.add(bytes)),
                Self::ToDevice(host) => Self::ToDevice(host.add(bytes)),
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.origin {
            Origin::Empty => {}
            Origin::Pool(class) => self.stream.recycle(class, self.address),
            // The owner may free the memory as soon as it is dropped.
            Origin::Foreign { ref owner } => {
                if let Err(error) = self.stream.synchronize() {
                    tracing::warn!(%error, "work on foreign memory may be under way: it is kept");
                    std::mem::forget(Arc::clone(owner));
                }
            }
        }
    }
}
