//! Trials that need a GPU: reported as ignored where there is none, and failing there under
//! `KASMINA_REQUIRE_GPU=1`.

use std::env;
use std::sync::Arc;

use kasmina::Device;
use libtest_mimic::{Failed, Trial};

/// GPU 0, or why there is none.
#[derive(Clone)]
pub(crate) struct Gpu {
    device: Arc<Result<Device, String>>,
    required: bool,
}

impl Gpu {
    pub(crate) fn find() -> Self {
        let device = Device::cuda(0).map_err(|error| error.to_string());
        let required = env::var_os("KASMINA_REQUIRE_GPU").is_some_and(|value| value == "1");
        Self { device: Arc::new(device), required }
    }

    fn device(&self) -> Result<&Device, Failed> {
        self.device.as_ref().as_ref().map_err(|error| format!("no GPU to test on: {error}").into())
    }

    /// A trial on the GPU.
    pub(crate) fn trial(
        &self,
        name: impl Into<String>,
        run: impl FnOnce(&Device) -> Result<(), Failed> + Send + 'static,
    ) -> Trial {
        let gpu = self.clone();
        let ignored = self.device.is_err() && !self.required;
        Trial::test(name, move || run(gpu.device()?)).with_ignored_flag(ignored)
    }
}
