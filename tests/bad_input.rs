//! What is wrong is refused with a typed error before anything is enqueued, and what it was given
//! to works afterwards.

#[path = "support/gpu.rs"]
mod gpu;

use std::any::Any;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use gpu::Gpu;
use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, DeviceId, Error, ForeignPointerFault, KasminaLayer, KernelConfig,
    LinearConfig, Shape, Tensor, Tier, WeightLayout, gemm,
};
use kasmina_kernels::abi::{MODULES, Module};
use libtest_mimic::{Arguments, Failed, Trial};

/// Set for a process of its own that opens a device in the environment under test.
const CHILD: &str = "KASMINA_TEST_CHILD";

type Check = fn(&Device) -> Result<(), Failed>;

fn main() -> ExitCode {
    if let Some(how) = env::var_os(CHILD) {
        let device = if how == "auto" { Device::auto() } else { Device::cuda(0) };
        println!("{:?}", device.map(|device| device.id()));
        return ExitCode::SUCCESS;
    }
    let gpu = Gpu::find();
    let on_any_device: [(&str, Check); 8] = [
        ("mismatched_shapes_are_refused", shapes),
        ("another_element_type_is_refused", element_types),
        ("parameters_of_the_wrong_length_are_refused", parameters),
        ("a_layer_without_features_is_refused", no_features),
        ("sizes_that_overflow_are_refused", overflow),
        ("more_memory_than_there_is_is_refused", out_of_memory),
        ("views_beyond_a_tensor_are_refused", ranges),
        ("an_output_that_overlaps_an_input_is_refused", overlap),
    ];
    let mut trials = Vec::new();
    for (name, check) in on_any_device {
        trials.push(Trial::test(format!("cpu_{name}"), move || check(&Device::cpu())));
        trials.push(gpu.trial(format!("gpu_{name}"), check));
    }
    let on_gpu: [(&str, Check); 8] = [
        ("a_tensor_of_another_device_is_refused", another_device),
        ("a_gpu_that_does_not_exist_is_refused", no_such_gpu),
        ("extents_beyond_31_bits_are_refused", extents),
        ("a_null_foreign_pointer_is_refused", null_pointer),
        ("a_misaligned_foreign_pointer_is_refused", misaligned_pointer),
        ("a_truncated_ptx_override_is_rejected", truncated_ptx),
        ("a_ptx_override_without_the_entry_is_refused", stale_ptx),
        ("a_ptx_override_that_is_not_there_is_refused", missing_ptx),
    ];
    trials.extend(on_gpu.map(|(name, check)| gpu.trial(name, check)));
    let second = Device::cuda(1);
    let alone = second.is_err();
    let check = move |first: &Device| second_gpu(first, &second?);
    let trial = gpu.trial("a_tensor_of_a_second_gpu_is_refused", check);
    // One GPU is all that can be required.
    trials.push(trial.with_ignored_flag(alone));
    trials.extend([
        Trial::test("a_foreign_pointer_to_host_memory_is_refused", host_pointer),
        Trial::test("a_missing_driver_is_an_error_of_its_own", missing_driver),
        Trial::test("a_tier_that_is_none_is_refused", unknown_tier),
    ]);
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

const IN: usize = 24;
const OUT: usize = 40;

/// A layer with an input and the output it had before anything went wrong.
struct Subject {
    layer: KasminaLayer,
    x: Tensor<f32>,
    expected: Vec<f32>,
}

impl Subject {
    fn new(device: &Device) -> Result<Self, Failed> {
        let layer = LinearConfig::new(IN, OUT).activation(Activation::Relu).build(device)?;
        let x = Tensor::full(device, [5, IN], 0.25f32)?;
        let expected = layer.forward(&x)?.to_vec()?;
        Ok(Self { layer, x, expected })
    }

    /// The layer still computes what it did, and nothing that was enqueued has failed.
    fn works(&self) -> Result<(), Failed> {
        self.layer.device().synchronize()?;
        require(self.layer.forward(&self.x)?.to_vec()? == self.expected, || "it computes otherwise")
    }
}

/// Fails unless the result is an error that matches.
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result {
            Err($pattern) $(if $guard)? => {}
            Err(error) => return Err(format!("another error: {error:?}").into()),
            Ok(_) => return Err(concat!("accepted: ", stringify!($result)).into()),
        }
    };
}

fn shapes(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    let layer = &subject.layer;
    let wide = Tensor::<f32>::zeros(device, [5, IN + 1])?;
    refused!(
        layer.forward(&wide),
        Error::Shape { operand: "x", expected, got, .. }
            if expected == Shape::from([5, IN]) && got == Shape::from([5, IN + 1])
    );
    for shape in [[4, OUT], [5, OUT + 1]] {
        let mut y = Tensor::full(device, shape, 7.0f32)?;
        refused!(layer.forward_into(&subject.x, &mut y), Error::Shape { operand: "y", .. });
        require(y.to_vec()?.iter().all(|&value| value == 7.0), || "the output was written")?;
    }
    refused!(Tensor::from_slice(device, &[0.0f32; 5], [2, 3]), Error::Shape { .. });
    subject.works()
}

fn element_types(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    let half = Tensor::<f16>::zeros(device, [5, IN])?;
    refused!(
        subject.layer.forward(&half),
        Error::DType { expected: DType::F32, got: DType::F16, .. }
    );
    let mut y = Tensor::full(device, [5, OUT], bf16::ONE)?;
    let x = Tensor::<bf16>::zeros(device, [5, IN])?;
    refused!(
        subject.layer.forward_into(&x, &mut y),
        Error::DType { expected: DType::F32, got: DType::BF16, .. }
    );
    require(y.to_vec()?.iter().all(|&value| value == bf16::ONE), || "the output was written")?;
    subject.works()
}

fn parameters(device: &Device) -> Result<(), Failed> {
    let mut subject = Subject::new(device)?;
    refused!(subject.layer.set_weight(&[1.0; IN * OUT - 1]), Error::Shape { .. });
    refused!(subject.layer.set_bias(&[1.0; OUT + 1]), Error::Shape { .. });
    let mut without = LinearConfig::new(IN, OUT).bias(false).build(device)?;
    refused!(without.set_bias(&[1.0; OUT]), Error::Shape { .. });
    subject.works()
}

fn no_features(device: &Device) -> Result<(), Failed> {
    for (inputs, outputs) in [(0, OUT), (IN, 0)] {
        refused!(
            LinearConfig::new(inputs, outputs).build(device),
            Error::Shape { operand: "weight", .. }
        );
    }
    Subject::new(device)?.works()
}

fn overflow(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    for shape in [[usize::MAX, 2], [1 << 40, 1 << 40], [isize::MAX as usize / 2, 1]] {
        refused!(Tensor::<f32>::zeros(device, shape), Error::Overflow { .. });
    }
    refused!(LinearConfig::new(1 << 40, 1 << 40).build(device), Error::Overflow { .. });
    refused!(subject.layer.tier_for(usize::MAX), Error::Overflow { .. });
    subject.works()
}

fn out_of_memory(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    // More than an address space, as systems promise more memory than they have.
    let elements = if device.is_cuda() { 1 << 42 } else { 1 << 59 };
    let at = device.id();
    refused!(
        Tensor::<f32>::zeros(device, [elements]),
        Error::OutOfMemory { device, requested, .. }
            if device == at && requested >= 4 * elements as u64
    );
    if device.is_cuda() {
        refused!(
            LinearConfig::new(1 << 21, 1 << 21).build(device),
            Error::OutOfMemory { device, .. } if device == at
        );
    }
    subject.works()
}

fn ranges(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    refused!(subject.x.columns(1..IN + 1), Error::OutOfRange { end, len: IN, .. } if end == IN + 1);
    refused!(subject.x.rows(6..6), Error::OutOfRange { start: 6, len: 5, .. });
    subject.works()
}

fn overlap(device: &Device) -> Result<(), Failed> {
    let subject = Subject::new(device)?;
    let whole = Tensor::full(device, [5, IN + OUT], 0.25f32)?;
    let x = whole.columns(0..IN)?;
    let mut y = whole.columns(IN - 1..IN - 1 + OUT)?;
    refused!(subject.layer.forward_into(&x, &mut y), Error::Overlap { operand: "x", .. });
    require(y.to_vec()?.iter().all(|&value| value == 0.25), || "the output was written")?;
    subject.layer.forward_into(&x, &mut whole.columns(IN..IN + OUT)?)?;
    subject.works()
}

fn another_device(gpu: &Device) -> Result<(), Failed> {
    let cpu = Device::cpu();
    let (at, host) = (gpu.id(), DeviceId::Cpu);
    let (subject, on_host) = (Subject::new(gpu)?, Subject::new(&cpu)?);
    refused!(
        subject.layer.forward(&on_host.x),
        Error::DeviceMismatch { operand: "x", expected, got, .. } if expected == at && got == host
    );
    refused!(
        on_host.layer.forward(&subject.x),
        Error::DeviceMismatch { operand: "x", expected, got, .. } if expected == host && got == at
    );
    let mut y = Tensor::full(&cpu, [5, OUT], 7.0f32)?;
    refused!(
        subject.layer.forward_into(&subject.x, &mut y),
        Error::DeviceMismatch { operand: "y", .. }
    );
    require(y.to_vec()?.iter().all(|&value| value == 7.0), || "the output was written")?;
    subject.works()?;
    on_host.works()
}

fn second_gpu(first: &Device, second: &Device) -> Result<(), Failed> {
    let (here, there) = (Subject::new(first)?, Subject::new(second)?);
    refused!(
        here.layer.forward(&there.x),
        Error::DeviceMismatch {
            operand: "x",
            expected: DeviceId::Cuda(0),
            got: DeviceId::Cuda(1),
            ..
        }
    );
    here.works()?;
    there.works()
}

fn no_such_gpu(gpu: &Device) -> Result<(), Failed> {
    refused!(
        Device::cuda(1000),
        Error::NoDevice { requested: 1000, available } if available >= 1
    );
    Subject::new(gpu)?.works()
}

fn extents(gpu: &Device) -> Result<(), Failed> {
    let subject = Subject::new(gpu)?;
    let rows = 1 << 31;
    let at = |address, columns| {
        // SAFETY: nobody reads or writes it, because the call that it is given to is refused.
        unsafe { Tensor::<f32>::from_raw(gpu, address, [rows, columns], columns, Arc::new(())) }
    };
    let (x, mut y) = (at(1 << 20, IN)?, at(1 << 50, OUT)?);
    refused!(subject.layer.forward_into(&x, &mut y), Error::Overflow { .. });
    subject.works()
}

/// A tensor over `address`, which must be refused.
fn foreign(device: &Device, address: u64, row_stride: usize) -> Result<Tensor<f32>, Error> {
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(());
    // SAFETY: refused before the pointer is used.
    unsafe { Tensor::from_raw(device, address, [5, IN], row_stride, owner) }
}

fn null_pointer(gpu: &Device) -> Result<(), Failed> {
    let subject = Subject::new(gpu)?;
    refused!(foreign(gpu, 0, IN), Error::ForeignPointer { reason: ForeignPointerFault::Null });
    subject.works()
}

fn misaligned_pointer(gpu: &Device) -> Result<(), Failed> {
    let subject = Subject::new(gpu)?;
    let address = subject.x.as_device_ptr() + 2;
    refused!(
        foreign(gpu, address, IN),
        Error::ForeignPointer { reason: ForeignPointerFault::Misaligned { address: got, align: 4 } }
            if got == address
    );
    refused!(
        foreign(gpu, address - 2, IN - 1),
        Error::ForeignPointer { reason: ForeignPointerFault::RowStride { row_stride, columns: IN } }
            if row_stride == IN - 1
    );
    // What is in order is taken, and computes.
    let owner = Arc::new(subject.x.clone());
    // SAFETY: the memory of a tensor of this shape, which the owner shares; the same stream.
    let x = unsafe { Tensor::<f32>::from_raw(gpu, address - 2, [5, IN], IN, owner) }?;
    require(subject.layer.forward(&x)?.to_vec()? == subject.expected, || "it computes otherwise")
}

fn host_pointer() -> Result<(), Failed> {
    refused!(
        foreign(&Device::cpu(), 4096, IN),
        Error::ForeignPointer { reason: ForeignPointerFault::HostDevice }
    );
    Ok(())
}

/// A folder of PTX modules that is removed again.
struct PtxFolder(PathBuf);

impl PtxFolder {
    /// With the module of the portable f32 kernels made of `text` by `change`.
    fn with(name: &str, change: impl FnOnce(&str) -> String) -> Result<Self, Failed> {
        let folder = env::temp_dir().join(format!("kasmina-{name}-{}", std::process::id()));
        let folder = Self(folder);
        folder.put(change(&module().ptx()))?;
        Ok(folder)
    }

    fn put(&self, text: String) -> Result<(), Failed> {
        let tier = self.0.join(module().tier.name());
        fs::create_dir_all(&tier)?;
        Ok(fs::write(tier.join(format!("{}.ptx", module().name)), text)?)
    }

    fn config(&self) -> KernelConfig {
        KernelConfig::default().tier(Tier::Portable).ptx_dir(&self.0)
    }
}

impl Drop for PtxFolder {
    fn drop(&mut self) {
        // What stays in a temporary folder does no harm.
        drop(fs::remove_dir_all(&self.0));
    }
}

fn module() -> &'static Module {
    let entry = "gemm_f32_nk_128x128x16";
    let holds = |module: &&&Module| module.entries.contains(&entry);
    MODULES.iter().find(holds).expect("the portable tier has an f32 kernel")
}

/// Runs a pass with a config that fails and gives its error, once it is sure that nothing was
/// written and that the same operands work without the override.
fn failing_override(gpu: &Device, config: &KernelConfig) -> Result<Error, Failed> {
    let subject = Subject::new(gpu)?;
    let w = Tensor::full(gpu, [OUT, IN], 0.5f32)?;
    let mut y = Tensor::full(gpu, [5, OUT], 7.0f32)?;
    let (layout, activation) = (WeightLayout::OutIn, Activation::None);
    let forward = gemm::Forward { x: &subject.x, w: &w, bias: None, layout, activation };
    let Err(error) = forward.run(&mut y, config) else {
        return Err("the override was accepted".into());
    };
    require(y.to_vec()?.iter().all(|&value| value == 7.0), || "the output was written")?;
    forward.run(&mut y, &KernelConfig::default().tier(Tier::Portable))?;
    require(y.to_vec()?.iter().all(|&value| value == 3.0), || "it computes otherwise")?;
    subject.works()?;
    Ok(error)
}

fn truncated_ptx(gpu: &Device) -> Result<(), Failed> {
    let folder = PtxFolder::with("truncated", |text| text[..text.len() / 2].to_owned())?;
    refused!(
        Err::<(), _>(failing_override(gpu, &folder.config())?),
        Error::ModuleRejected { module, .. } if module.contains("gemm_f32")
    );
    // Once the file is whole, the same config works.
    folder.put(module().ptx())?;
    let layer = LinearConfig::new(IN, OUT).kernel_config(folder.config()).build(gpu)?;
    layer.forward(&Tensor::full(gpu, [5, IN], 0.25f32)?)?.to_vec()?;
    Ok(())
}

fn stale_ptx(gpu: &Device) -> Result<(), Failed> {
    let folder = PtxFolder::with("stale", |text| text.replace("gemm_f32_nk", "gemm_f32_older"))?;
    refused!(
        Err::<(), _>(failing_override(gpu, &folder.config())?),
        Error::EntryMissing { entry: "gemm_f32_nk_128x128x16", .. }
    );
    Ok(())
}

fn missing_ptx(gpu: &Device) -> Result<(), Failed> {
    let folder = env::temp_dir().join("kasmina-there-is-no-such-folder");
    let config = KernelConfig::default().tier(Tier::Portable).ptx_dir(&folder);
    refused!(
        Err::<(), _>(failing_override(gpu, &config)?),
        Error::PtxUnreadable { path, .. } if path.starts_with(&folder)
    );
    Ok(())
}

/// What a process of its own prints that opens a device with these environment variables.
fn opened(how: &str, variables: &[(&str, &str)]) -> Result<String, Failed> {
    let mut command = Command::new(env::current_exe()?);
    command.env_remove("KASMINA_TIER").env(CHILD, how).envs(variables.iter().copied());
    Ok(String::from_utf8_lossy(&command.output()?.stdout).into_owned())
}

fn missing_driver() -> Result<(), Failed> {
    let nowhere = ("KASMINA_LIBCUDA", "/nonexistent/libcuda.so.1");
    for (how, variables, expected) in [
        ("cuda", &[nowhere][..], "Err(NoDriver "),
        ("auto", &[nowhere], "Ok(Cpu)"),
        // A forced tier is never replaced by the CPU.
        ("auto", &[nowhere, ("KASMINA_TIER", "portable")], "Err(NoDriver "),
    ] {
        let got = opened(how, variables)?;
        require(got.starts_with(expected), || format!("{how} {variables:?}: {got}"))?;
    }
    Ok(())
}

fn unknown_tier() -> Result<(), Failed> {
    for how in ["auto", "cuda"] {
        let got = opened(how, &[("KASMINA_TIER", "warp")])?;
        let expected = r#"Err(UnknownTier { name: "warp","#;
        require(got.starts_with(expected), || format!("{how}: {got}"))?;
    }
    Ok(())
}

fn require<M: Into<Failed>>(holds: bool, message: impl FnOnce() -> M) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
