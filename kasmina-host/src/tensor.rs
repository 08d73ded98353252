//! Arrays on a device.

mod assign;
mod reshape;
mod span;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kasmina_kernels::abi::DType;

use crate::device::{Device, DeviceId};
use crate::element::Element;
use crate::error::{Error, ForeignPointerFault, Result};
use crate::gpu;
use crate::shape::Shape;
use span::Span;

/// A row-major array in the memory of a [`Device`].
///
/// A clone or a view shares the memory: writing through one shows in all. The last axis is
/// contiguous; the distance from one row to the next may exceed the row, as in a view of columns.
/// Memory of a dropped tensor goes back to the pool of the stream it was made on, in stream order,
/// so that dropping does not wait; only foreign memory, and the last user of a stream, wait for it.
pub struct Tensor<T: Element> {
    device: Device,
    storage: Arc<Storage<T>>,
    /// Elements before the first one of this view.
    offset: usize,
    shape: Shape,
    row_stride: usize,
}

enum Storage<T> {
    /// Readers take the inner `Arc` and keep what they saw; a writer replaces it, or copies it if
    /// somebody still reads. So no lock is held while anything is computed.
    Host(Mutex<Arc<Vec<T>>>),
    Gpu(gpu::Buffer),
}

/// Rows of a tensor within its storage, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    /// From the start of the storage to the first row.
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) row_bytes: usize,
    /// From the start of one row to the start of the next.
    pub(crate) row_stride: usize,
}

/// The part of a host tensor's storage that starts at the tensor's first element.
pub(crate) struct HostView<T> {
    values: Arc<Vec<T>>,
    offset: usize,
}

impl<T> HostView<T> {
    pub(crate) fn values(&self) -> &[T] {
        &self.values[self.offset..]
    }
}

impl<T: Element> Tensor<T> {
    /// A tensor that holds `data`, in row-major order. Returns once the data has been read.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` has another number of elements than `shape`,
    /// [`Error::OutOfMemory`], [`Error::Overflow`], [`Error::Driver`].
    pub fn from_slice(device: &Device, data: &[T], shape: impl Into<Shape>) -> Result<Self> {
        let op = "Tensor::from_slice";
        let shape = shape.into();
        check_length(op, data.len(), shape)?;
        let tensor = match device.stream().gpu() {
            Some(_) => Self::uninitialised(device, shape, op)?,
            None => Self::on_host(device, collect(data.len(), data.iter().copied())?, shape),
        };
        tensor.upload(data)?;
        Ok(tensor)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Overflow`], [`Error::Driver`].
    pub fn zeros(device: &Device, shape: impl Into<Shape>) -> Result<Self> {
        Self::full(device, shape, T::zeroed())
    }

    /// A tensor whose elements are all `value`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Overflow`], [`Error::Driver`].
    pub fn full(device: &Device, shape: impl Into<Shape>, value: T) -> Result<Self> {
        let op = "Tensor::full";
        let shape = shape.into();
        let elements = element_count::<T>(op, shape)?;
        if device.stream().gpu().is_none() {
            let values = collect(elements, std::iter::repeat_n(value, elements))?;
            return Ok(Self::on_host(device, values, shape));
        }
        let tensor = Self::uninitialised(device, shape, op)?;
        if let Storage::Gpu(buffer) = &*tensor.storage {
            buffer.fill(bytemuck::bytes_of(&value), elements)?;
        }
        Ok(tensor)
    }

    /// A tensor for an operation to write: its elements are whatever the memory held before.
    pub(crate) fn uninitialised(device: &Device, shape: Shape, op: &'static str) -> Result<Self> {
        let elements = element_count::<T>(op, shape)?;
        let storage = match device.stream().gpu() {
            Some(stream) => Storage::Gpu(stream.allocate(elements * size_of::<T>())?),
            None => Storage::Host(Mutex::new(Arc::new(zeroed(elements)?))),
        };
        Ok(Self::contiguous(device, storage, shape))
    }

    fn on_host(device: &Device, values: Vec<T>, shape: Shape) -> Self {
        Self::contiguous(device, Storage::Host(Mutex::new(Arc::new(values))), shape)
    }

    fn contiguous(device: &Device, storage: Storage<T>, shape: Shape) -> Self {
        Self {
            device: device.clone(),
            storage: Arc::new(storage),
            offset: 0,
            shape,
            row_stride: shape.columns(),
        }
    }

    /// A tensor over GPU memory that somebody else allocated.
    ///
    /// `row_stride` is in elements. `owner` keeps the memory alive: it is dropped with the last
    /// tensor that shares it, after waiting for the device handle's stream. Work of other
    /// libraries on that memory must be ordered with [`Stream::wait`](crate::Stream::wait) or by
    /// synchronising.
    ///
    /// # Errors
    /// [`Error::ForeignPointer`] for a null or misaligned pointer, for rows that overlap, and for
    /// a CPU device; [`Error::Overflow`].
    ///
    /// # Safety
    /// As long as `owner` lives, `ptr` must be the address of memory of the GPU of `device` that
    /// holds `rows - 1` rows of `row_stride` elements and one of the shape's columns, and that
    /// nothing else reads or writes unless ordered with the stream of `device`.
    pub unsafe fn from_raw(
        device: &Device,
        ptr: u64,
        shape: impl Into<Shape>,
        row_stride: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let op = "Tensor::from_raw";
        let shape = shape.into();
        let refused = |reason| Err(Error::ForeignPointer { reason });
        let Some(stream) = device.stream().gpu() else {
            return refused(ForeignPointerFault::HostDevice);
        };
        let elements = element_count::<T>(op, shape)?;
        if ptr == 0 && elements > 0 {
            return refused(ForeignPointerFault::Null);
        }
        if !ptr.is_multiple_of(size_of::<T>() as u64) {
            let align = size_of::<T>();
            return refused(ForeignPointerFault::Misaligned { address: ptr, align });
        }
        if row_stride < shape.columns() {
            let columns = shape.columns();
            return refused(ForeignPointerFault::RowStride { row_stride, columns });
        }
        let extent = extent(shape, elements, row_stride)
            .and_then(|extent| extent.checked_mul(size_of::<T>()))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(too_many_bytes(op))?;
        // SAFETY: the caller vouches for `extent` bytes at `ptr` while `owner` lives.
        let buffer = unsafe { gpu::Buffer::foreign(stream, ptr, extent, owner) };
        let storage = Arc::new(Storage::Gpu(buffer));
        Ok(Self { device: device.clone(), storage, offset: 0, shape, row_stride })
    }

    /// The elements in row-major order. Waits for everything enqueued on the tensor's stream.
    ///
    /// # Errors
    /// [`Error::Driver`] if the copy or an operation before it failed.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let (rows, columns) = (self.shape.rows(), self.shape.columns());
        let mut values = zeroed(self.len())?;
        if values.is_empty() {
            return Ok(values);
        }
        match &*self.storage {
            Storage::Host(_) => {
                let view = self.host_view();
                let source = view.values();
                for (row, target) in (0..rows).zip(values.chunks_exact_mut(columns)) {
                    target.copy_from_slice(&source[row * self.row_stride..][..columns]);
                }
            }
            Storage::Gpu(buffer) => {
                buffer.read(self.region(), bytemuck::cast_slice_mut(&mut values))?;
            }
        }
        Ok(values)
    }

    /// Overwrites the elements, in row-major order, also for everybody who shares the memory.
    /// Returns once the data has been read.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` has another number of elements, [`Error::Driver`].
    pub fn copy_from_slice(&mut self, data: &[T]) -> Result<()> {
        check_length("Tensor::copy_from_slice", data.len(), self.shape)?;
        match &*self.storage {
            Storage::Host(_) => self.store(collect(data.len(), data.iter().copied())?),
            Storage::Gpu(..) => self.upload(data)?,
        }
        Ok(())
    }

    fn upload(&self, data: &[T]) -> Result<()> {
        match &*self.storage {
            Storage::Gpu(buffer) if !data.is_empty() => {
                buffer.write(self.region(), bytemuck::cast_slice(data))
            }
            _ => Ok(()),
        }
    }

    /// Puts `values`, one for each element in row-major order, into host memory.
    pub(crate) fn store(&self, values: Vec<T>) {
        let Storage::Host(shared) = &*self.storage else { return };
        if values.is_empty() {
            return;
        }
        let mut shared = lock(shared);
        if shared.len() == values.len() {
            *shared = Arc::new(values);
            return;
        }
        let columns = self.shape.columns();
        let target = &mut Arc::make_mut(&mut shared)[self.offset..];
        for (row, source) in values.chunks_exact(columns).enumerate() {
            target[row * self.row_stride..][..columns].copy_from_slice(source);
        }
    }

    /// What host memory holds now, from the first element on; empty on a GPU.
    pub(crate) fn host_view(&self) -> HostView<T> {
        match &*self.storage {
            Storage::Host(shared) => {
                HostView { values: Arc::clone(&lock(shared)), offset: self.offset }
            }
            Storage::Gpu(..) => HostView { values: Arc::new(Vec::new()), offset: 0 },
        }
    }

    /// The extents.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        // Checked when the storage was made, and a view has no more elements than its origin.
        self.shape.elements().unwrap_or(0)
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The device handle whose stream the tensor belongs to.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Elements from the start of one row to the start of the next.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The element type.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        T::DTYPE
    }

    /// The device address of the first element; 0 on the CPU and for a tensor without elements.
    ///
    /// It is valid as long as a tensor shares the memory. Work of other libraries on it must be
    /// ordered with the stream of [`device`](Self::device).
    #[must_use]
    pub fn as_device_ptr(&self) -> u64 {
        match &*self.storage {
            Storage::Gpu(buffer) if !self.is_empty() => {
                buffer.address() + (self.offset * size_of::<T>()) as u64
            }
            _ => 0,
        }
    }

    /// A view of some columns: `range` of the last axis.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn columns(&self, range: Range<usize>) -> Result<Self> {
        check_range("Tensor::columns", &range, self.shape.columns())?;
        Ok(self.view(range.start, self.shape.with_columns(range.len())))
    }

    /// A view of some rows of a matrix, or of the corresponding part of a tensor with more axes:
    /// `range` of the first axis. A tensor with one axis counts as one row.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        let extents = self.shape.extents();
        let (first, inner) = match extents {
            [_] => (1, 1),
            [first, inner @ .., _] => {
                (*first, inner.iter().fold(1usize, |rows, &extent| rows.saturating_mul(extent)))
            }
            [] => (0, 0),
        };
        check_range("Tensor::rows", &range, first)?;
        let shape = match extents {
            [_] => Shape::from([range.len(), self.shape.columns()]),
            _ => self.shape.with_leading(range.len()),
        };
        // Nothing lies anywhere in an empty tensor, whose extents may be beyond multiplying.
        let skipped = if self.is_empty() { 0 } else { range.start * inner * self.row_stride };
        Ok(self.view(skipped, shape))
    }

    fn view(&self, skipped: usize, shape: Shape) -> Self {
        Self {
            device: self.device.clone(),
            storage: Arc::clone(&self.storage),
            offset: self.offset + skipped,
            shape,
            row_stride: self.row_stride,
        }
    }

    fn region(&self) -> Region {
        let size = size_of::<T>();
        Region {
            offset: self.offset * size,
            rows: self.shape.rows(),
            row_bytes: self.shape.columns() * size,
            row_stride: self.row_stride * size,
        }
    }

    /// Whether an element of one is an element of the other.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        if self.is_empty() || other.is_empty() {
            return false;
        }
        let (start, other_start) = match (&*self.storage, &*other.storage) {
            (Storage::Host(_), Storage::Host(_)) if Arc::ptr_eq(&self.storage, &other.storage) => {
                (self.offset as u64, other.offset as u64)
            }
            // Addresses, because foreign memory may back two storages.
            (Storage::Gpu(..), Storage::Gpu(..)) => {
                let size = size_of::<T>() as u64;
                (self.as_device_ptr() / size, other.as_device_ptr() / size)
            }
            _ => return false,
        };
        let spans = |tensor: &Self, start| Span {
            start,
            rows: tensor.shape.rows() as u64,
            columns: tensor.shape.columns() as u64,
            row_stride: tensor.row_stride as u64,
        };
        spans(self, start).overlaps(spans(other, other_start))
    }
}

impl<T: Element> Clone for Tensor<T> {
    fn clone(&self) -> Self {
        self.view(0, self.shape)
    }
}

impl<T: Element> fmt::Debug for Tensor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("dtype", &T::DTYPE)
            .field("shape", &self.shape)
            .field("row_stride", &self.row_stride)
            .field("device", &self.device.id())
            .finish_non_exhaustive()
    }
}

/// A poisoned lock is taken as it is: the value is replaced as a whole or in plain copies.
fn lock<T>(shared: &Mutex<Arc<Vec<T>>>) -> MutexGuard<'_, Arc<Vec<T>>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A vector of exactly `len` values, or [`Error::OutOfMemory`] where `collect` would abort.
fn collect<T: Element>(len: usize, values: impl Iterator<Item = T>) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(len).map_err(|_| out_of_host_memory::<T>(len))?;
    vector.extend(values);
    Ok(vector)
}

/// `len` zeros, whose pages the system provides when they are written.
pub(crate) fn zeroed<T: Element>(len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| out_of_host_memory::<T>(len))
}

const fn out_of_host_memory<T: Element>(len: usize) -> Error {
    let requested = (len as u64).saturating_mul(size_of::<T>() as u64);
    Error::OutOfMemory { device: DeviceId::Cpu, requested, free: None }
}

/// The number of elements, if they also fit memory as bytes.
fn element_count<T: Element>(op: &'static str, shape: Shape) -> Result<usize> {
    shape
        .elements()
        .filter(|elements| {
            elements.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok())
        })
        .ok_or(too_many_bytes(op))
}

const fn too_many_bytes(op: &'static str) -> Error {
    Error::Overflow { op, quantity: "the tensor's size in bytes", limit: isize::MAX as u64 }
}

/// Elements from the first to one past the last.
fn extent(shape: Shape, elements: usize, row_stride: usize) -> Option<usize> {
    if elements == 0 {
        return Some(0);
    }
    (shape.rows() - 1).checked_mul(row_stride)?.checked_add(shape.columns())
}

fn check_length(op: &'static str, len: usize, shape: Shape) -> Result<()> {
    if shape.elements() == Some(len) {
        return Ok(());
    }
    Err(Error::Shape { op, operand: "data", expected: shape, got: [len].into() })
}

fn check_range(op: &'static str, range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    Err(Error::OutOfRange { op, start: range.start, end: range.end, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn counting(shape: impl Into<Shape>) -> Tensor<f32> {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elements().unwrap()).map(|i| i as f32).collect();
        Tensor::from_slice(&Device::cpu(), &values, shape).unwrap()
    }

    #[test]
    fn tensors_are_send_and_sync() {
        fn send_sync<T: Send + Sync>() {}
        send_sync::<Tensor<f32>>();
    }

    #[test]
    fn data_comes_back_as_it_was_given() {
        let values = [1.0, -2.5, 3.0].map(bf16::from_f32);
        let tensor = Tensor::from_slice(&Device::cpu(), &values, [3, 1]).unwrap();
        assert_eq!(tensor.to_vec().unwrap(), values);
        assert_eq!((tensor.dtype(), tensor.len(), tensor.row_stride()), (DType::BF16, 3, 1));
        let full = Tensor::full(&Device::cpu(), [2, 2], 7.0f32).unwrap();
        assert_eq!(full.to_vec().unwrap(), [7.0; 4]);
    }

    #[test]
    fn data_of_the_wrong_length_is_refused() {
        let error = Tensor::from_slice(&Device::cpu(), &[0.0f32; 5], [2, 3]).unwrap_err();
        assert!(matches!(error, Error::Shape { operand: "data", .. }));
        let error = counting([2, 3]).copy_from_slice(&[0.0; 7]).unwrap_err();
        assert!(matches!(error, Error::Shape { got, .. } if got == Shape::from([7])));
    }

    #[test]
    fn sizes_beyond_the_address_space_overflow_and_empty_ones_do_not() {
        for shape in [[usize::MAX, 1], [1 << 40, 1 << 40], [isize::MAX as usize / 2, 1]] {
            let error = Tensor::<f32>::zeros(&Device::cpu(), shape).unwrap_err();
            assert!(matches!(error, Error::Overflow { .. }), "{error}");
        }
        let empty = Tensor::<f32>::zeros(&Device::cpu(), [usize::MAX, 0]).unwrap();
        assert!(empty.is_empty() && empty.to_vec().unwrap().is_empty());
    }

    #[test]
    fn more_than_there_is_memory_for_is_an_error() {
        let shape = [isize::MAX as usize / 8];
        let error = Tensor::<f32>::zeros(&Device::cpu(), shape).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { device: DeviceId::Cpu, .. }));
    }

    #[test]
    fn views_select_rows_and_columns() {
        let tensor = counting([3, 4]);
        let middle = tensor.columns(1..3).unwrap().rows(1..3).unwrap();
        assert_eq!(middle.to_vec().unwrap(), [5.0, 6.0, 9.0, 10.0]);
        assert_eq!((middle.shape().extents(), middle.row_stride()), (&[2, 2][..], 4));
        let deep = counting([2, 3, 2]).rows(1..2).unwrap();
        assert_eq!(deep.shape().extents(), [1, 3, 2]);
        assert_eq!(deep.to_vec().unwrap(), [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
        assert_eq!(counting([4]).rows(0..1).unwrap().shape().extents(), [1, 4]);
        assert!(tensor.columns(2..2).unwrap().to_vec().unwrap().is_empty());
    }

    #[test]
    fn views_beyond_the_tensor_are_refused() {
        let tensor = counting([3, 4]);
        let error = tensor.columns(2..5).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { start: 2, end: 5, len: 4, .. }));
        assert!(tensor.rows(4..4).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "a range that is refused")]
        let reversed = 2..1;
        assert!(tensor.rows(reversed).is_err());
    }

    #[test]
    fn what_is_written_through_a_view_shows_in_every_sharer() {
        let tensor = counting([2, 3]);
        let clone = tensor.clone();
        let before = tensor.host_view();
        tensor.columns(1..2).unwrap().copy_from_slice(&[-1.0, -2.0]).unwrap();
        assert_eq!(clone.to_vec().unwrap(), [0.0, -1.0, 2.0, 3.0, -2.0, 5.0]);
        assert_eq!(before.values()[1], 1.0, "a reader keeps what it saw");
    }

    #[test]
    fn host_memory_is_no_foreign_pointer() {
        // SAFETY: refused before the pointer is used.
        let result = unsafe { Tensor::<f32>::from_raw(&Device::cpu(), 4096, [1], 1, Arc::new(())) };
        let reason = ForeignPointerFault::HostDevice;
        assert!(matches!(result, Err(Error::ForeignPointer { reason: got }) if got == reason));
    }
}
